"""Random changes of colours and shapes by torchvision's policies, and erased parts, on images that are squares already."""

import numpy as np
import torch


class Policy:
    """Changes to an image that depend on seed, epoch and index alone, whatever else draws from torch's generator."""

    def __init__(self, data, seed: int):
        # Takes a second to import, so only where it is wanted.
        from torchvision.transforms import v2

        augmentation, self.seed = data.augmentation, seed
        mean = [round(255 * value) for value in data.mean]
        policies = {
            "trivial_augment": lambda: v2.TrivialAugmentWide(fill=mean),
            "rand_augment": lambda: v2.RandAugment(augmentation.operations, augmentation.magnitude, fill=mean),
        }
        self.steps = [policies[augmentation.policy]()] if augmentation.policy != "none" else []
        if augmentation.erasing:
            # The mean is 0 once the image is normalised.
            self.steps.append(v2.RandomErasing(augmentation.erasing, value=mean))

    def __call__(self, pixels: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """uint8 (size, size, 3) -> the same, changed."""
        generator = torch.default_generator
        before = generator.get_state()
        # Not torch.manual_seed, which would seed the GPU's generator too.
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index, 1)).generate_state(1, np.uint64)[0] >> 1))
        try:
            image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
            for step in self.steps:
                image = step(image)
        finally:
            generator.set_state(before)
        return image.permute(1, 2, 0).numpy()


def policy_for(data, seed: int) -> Policy | None:
    """That of the recipe's part `data`; None if it has none."""
    return Policy(data, seed) if data.augmentation.policy != "none" or data.augmentation.erasing else None
