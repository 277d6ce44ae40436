"""Jobs of test_cuda_graphs: steps as CUDA graphs, against the same steps launched one kernel after the other."""

import warnings

import torch

from dnal_dist import nets
from dnal_dist.distributed.context import Context
from dnal_dist.recipe import SGD, Training
from dnal_dist.search.architecture import Architecture
from dnal_dist.training.steps import architecture_step, weight_step


def against_eager(context: Context, name: str, clip: float | None) -> dict:
    """Weight steps without gates, of two batch sizes, then a search, with and without graphs: the largest differences relative to
    the largest value, by tensor; the number of graphs; and whether torch's random numbers on the device went on alike."""
    context.backend, found, random, graphs = "single", [], [], 0
    for on in (True, False):
        torch.manual_seed(0)
        # The supernet multiplies what float32 rounds away by a thousand, and cuDNN need not choose the same algorithm twice.
        dtype = torch.float64 if name.startswith("supernet") else torch.float32
        net, training = nets.build(name).to(context.device, dtype), Training(cuda_graphs=on, tf32=False, cudnn_benchmark=False)
        context.tune(training)
        trained = context.wrap(net, SGD(lr=0.05, momentum=0.9, weight_decay=1e-4, clip_norm=clip), {}, training)
        architecture = Architecture(net.num_gates).to(context.device, dtype)
        alphas = torch.optim.SGD(architecture.parameters(), 0.01, 0.9)
        generator = torch.Generator().manual_seed(1)
        sums = []
        for step, size in enumerate((16, 16, 8, 16, 16, 16, 16, 16)):
            images = torch.randn(size, 3, 8, 8, generator=generator).to(context.device, dtype)
            images = images.to(memory_format=context.memory_format)
            labels = torch.randint(10, (size,), generator=generator).to(context.device)
            trained.set_rate(0.05 / (1 + step))
            if step in (5, 7):
                architecture_step(
                    trained, architecture, alphas, images, labels, size, 3.0, "sigmoid", 0.01, context.average_, clip_norm=clip
                )
            else:
                outcome = weight_step(trained, images, labels, size, architecture.gates(3.0) if step > 3 else None)
                sums.append(outcome.cross_entropy)
        graphs = max(graphs, sum(graph is not None for graph in trained.graphs.values()))
        assert on or not trained.graphs
        with trained.gathered() as momentum:
            tensors = {"alpha": architecture.alpha.detach(), "cross entropies": torch.stack(sums)}
            tensors |= {f"momentum.{key}": buffer for key, buffer in momentum.items()} | net.state_dict()
            found.append({key: tensor.double().cpu().clone() for key, tensor in tensors.items()})
        random.append(torch.cuda.get_rng_state(context.device).tolist())
        trained.close()
    ours, exact = found
    off = {key: float((ours[key] - exact[key]).abs().max() / exact[key].abs().max().clamp_min(1e-3)) for key in exact}
    return {"off": off, "graphs": graphs, "random": random[0] == random[1]}


def not_capturable(context: Context) -> dict:
    """A network that looks at a value as it computes."""

    class Looking(torch.nn.Sequential):
        def forward(self, x):
            assert float(x.sum()) != 1e9
            return super().forward(x)

    context.backend, training = "single", Training()
    context.tune(training)
    net = Looking(torch.nn.Flatten(), torch.nn.Linear(192, 10)).to(context.device)
    trained = context.wrap(net, SGD(lr=0.1), {}, training)
    before = [p.detach().clone() for p in trained.module.parameters()]
    images, labels = torch.randn(8, 3, 8, 8).to(context.device), torch.arange(8, device=context.device)
    random = torch.cuda.get_rng_state(context.device)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sums = [float(weight_step(trained, images, labels, 8).cross_entropy) for _ in range(3)]
    moved = not any(map(torch.equal, before, trained.module.parameters()))
    random = torch.equal(random, torch.cuda.get_rng_state(context.device))
    drawn = float(torch.randn(1000, device=context.device).std())
    return {"sums": sums, "moved": moved, "random": random, "drawn": drawn, "warnings": [str(one.message) for one in warned]}
