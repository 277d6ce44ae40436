"""dnal_dist: learn the architecture of a convolutional network by gradient descent while training it."""


def __getattr__(name: str):
    # Imported when used: torch takes seconds, and reports and shard tools need none of it.
    if name in ("Result", "train_recipe"):
        from dnal_dist.training import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
