"""The recipes of the paper's experiments say what the paper and its released code do, and recipes/README.md what it published."""

import re
from math import cos, pi
from pathlib import Path
from types import SimpleNamespace

import pytest

from dnal_dist import recipe
from dnal_dist.report import published
from dnal_dist.search import schedule


def steps_at_10_and_40(lr):
    return lambda e: lr if e < 10 else lr / 10 if e < 40 else lr / 100


def half_cosine(lr, position, horizon):
    return lr * 0.5 * (1 + cos(pi * position / horizon))


# Of each phase: the learning rate of the weights after e (fractional) epochs. Of ImageNet's, pretrain and finetune are the released
# code's; what weights get in the search, and all of CIFAR-10's, are this project's.
VGG16 = [lambda e: 0.01, lambda e: 0.01, steps_at_10_and_40(0.01)]
RESNET50 = [lambda e: 0.1, lambda e: 0.1, steps_at_10_and_40(0.1)]
MOBILENETV2 = [
    lambda e: half_cosine(0.1, e, 160),
    lambda e: half_cosine(0.1, 80 + e, 160),
    lambda e: half_cosine(0.1, 30 + e, 120),
]
PROXYLESS = [
    lambda e: half_cosine(0.05, e, 150),
    lambda e: half_cosine(0.05, 100 + e, 150),
    lambda e: half_cosine(0.05, 40 + e, 150),
]
CIFAR = [lambda e: half_cosine(0.1, e, 160), lambda e: 0.1, lambda e: half_cosine(0.1, e, 160)]

# network, epochs of each phase, global batch, weight decay, augmentation, learning rates, penalty weight
PAD, CROP = ("pad_crop", 4), "resized_crop"
PAPER = {
    "vgg16_cifar": ("vgg16_cifar", (160, 20, 160), 128, 5e-4, PAD, CIFAR, 1e-4),
    "resnet56_cifar": ("resnet56_cifar", (160, 20, 160), 128, 1e-4, PAD, CIFAR, 1e-4),
    "mobilenetv2_cifar": ("mobilenetv2_cifar", (160, 20, 160), 128, 1e-4, PAD, CIFAR, 1e-4),
    "vgg16_imagenet": ("vgg16_imagenet", (30, 10, 70), 128, 1e-4, (CROP, (0.08, 1)), VGG16, 1e-4),
    "resnet50_imagenet": ("resnet50_imagenet", (30, 10, 70), 256, 1e-4, (CROP, (0.08, 1)), RESNET50, 6e-5),
    "mobilenetv2_imagenet": ("mobilenetv2_imagenet", (80, 10, 90), 256, 4e-5, (CROP, (0.2, 1)), MOBILENETV2, 6e-5),
    "proxyless": ("proxyless_supernet", (100, 10, 110), 4 * 96, 4e-5, (CROP, (0.2, 1)), PROXYLESS, 6e-5),
}
IMAGES = {"CIFAR-10": 50_000, "ImageNet-1K": 1_281_167}
PHASES = ("pretrain", "search", "finetune")


@pytest.fixture(params=PAPER)
def case(request):
    """A recipe, its table in the paper, and what is expected of it."""
    path = Path(f"recipes/{request.param}.yaml")
    names = ("network", "epochs", "batch", "decay", "augmentation", "rates", "penalty_weight")
    expected = SimpleNamespace(**dict(zip(names, PAPER[request.param], strict=True)))
    settings = recipe.load(path)
    table = published.tables()[expected.network]
    head = path.read_text().split("\nname:")[0]
    return SimpleNamespace(path=path, settings=settings, expected=expected, table=table, head=head)


def test_every_table_of_the_paper_has_a_recipe():
    assert {network for network, *_ in PAPER.values()} == published.tables().keys()


def test_settings_are_the_papers(case):
    settings, expected = case.settings, case.expected
    assert settings.model.name == expected.network
    assert settings.model.num_classes == case.table.num_classes
    assert settings.data.global_batch == expected.batch
    phases = [getattr(settings.phases, phase) for phase in PHASES]
    assert tuple(phase.epochs for phase in phases) == expected.epochs
    assert {(p.optimizer.momentum, p.optimizer.weight_decay) for p in phases} == {(0.9, expected.decay)}
    assert (settings.phases.search.weight_steps, settings.phases.search.architecture_steps) == (1, 1)
    architecture = settings.architecture
    assert architecture.penalty_weight == expected.penalty_weight
    assert architecture.optimizer == recipe.SGD(lr=0.01, momentum=0.9, weight_decay=0)
    assert (architecture.penalty, architecture.threshold) == ("sigmoid", 0.9)


def test_epochs_are_those_that_the_table_prints(case):
    printed = {row.epochs for row in case.table.rows if row.method == "DNAL"}
    assert printed <= {"", "+".join(map(str, case.expected.epochs))}


def test_images_are_the_papers(case):
    data, (kind, amount) = case.settings.data, case.expected.augmentation
    assert (data.augmentation.kind, data.augmentation.flip) == (kind, True)
    if case.table.dataset == "CIFAR-10":
        assert (data.image_size, data.resize, data.augmentation.padding) == (32, None, amount)
        assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    else:
        assert (data.image_size, data.resize, data.augmentation.scale) == (224, 256, amount)
        # VGG and ResNet: resize 256 before the random part is taken.
        assert data.augmentation.resize == (256 if amount[0] == 0.08 else None)
        assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("number, name", list(enumerate(PHASES)))
def test_learning_rate_of_every_phase_is_the_formulas(case, number, name):
    phase, rate = getattr(case.settings.phases, name), case.expected.rates[number]
    per_epoch = IMAGES[case.table.dataset] // case.expected.batch
    epochs = case.expected.epochs[number]
    steps = {0, 1, per_epoch // 3, per_epoch * epochs - 1, *(per_epoch * epochs * i // 97 for i in range(97))}
    # On both sides of each milestone.
    steps |= {per_epoch * milestone - before for milestone in (10, 40) for before in (0, 1) if milestone < epochs}
    for step in steps:
        assert schedule.learning_rate_at(phase, step, per_epoch) == pytest.approx(rate(step / per_epoch), rel=1e-12), step


def test_gates_harden_geometrically_to_ten_thousand(case):
    per_epoch, count = 7, case.expected.epochs[1]
    for epoch in range(count):
        for step in (epoch * per_epoch, epoch * per_epoch + per_epoch - 1):
            found = schedule.delta_at(case.settings.phases.search, case.settings.architecture, step, per_epoch)
            assert found == pytest.approx(10_000 ** ((epoch + 1) / count))


def rows_of_readme(stem: str) -> list[list[str]]:
    """The cells of the table in the recipe's section of recipes/README.md, without its head."""
    section = Path("recipes/README.md").read_text().split(f"\n## [{stem}.yaml]({stem}.yaml): ")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]


def test_readme_lists_every_published_row_with_its_figures_and_override(case):
    def times(ratio):
        return f"{ratio}x" if ratio else "-"

    expected = []
    for row in case.table.rows:
        if row.method not in ("Baseline", "DNAL"):
            continue
        costs = [row.flops, times(row.flops_ratio), row.params, times(row.params_ratio)]
        if "flops" not in case.table.columns:
            costs = [row.params]
        own = row.penalty_weight and float(row.penalty_weight) == case.settings.architecture.penalty_weight
        name = f"**{row.penalty_weight}**" if own else row.penalty_weight or "full network"
        override = f"`architecture.penalty_weight={row.penalty_weight} output=runs/{case.path.stem}_{row.penalty_weight}`"
        expected.append([name, row.top1 or "-", row.top5 or "-", *costs, override if row.penalty_weight and not own else ""])
    assert rows_of_readme(case.path.stem) == expected
    assert [name for name, *_ in expected if name.startswith("**")], "the recipe's own penalty weight is no published row"


def test_overrides_of_the_readme_are_valid(case):
    for name, *_, override in rows_of_readme(case.path.stem):
        if override:
            changed = recipe.load(case.path, override.strip("`").split())
            assert changed.architecture.penalty_weight == float(name)
            assert changed.output != case.settings.output


@pytest.mark.parametrize("case", [stem for stem in PAPER if stem.endswith("_cifar")], indirect=True)
def test_what_we_recommend_has_the_cost_of_the_published_row(case):
    full = next(row for row in case.table.rows if row.method == "Baseline")
    own = next(r for r in case.table.rows if r.penalty_weight and float(r.penalty_weight) == case.expected.penalty_weight)
    share = f"{float(own.flops) / float(full.flops):.3f}"
    overrides = f"architecture.criterion=taylor architecture.target.macs={share}x output=runs/{case.path.stem}_taylor"
    assert f"recipes/{case.path.name} {overrides}\n" in Path("recipes/README.md").read_text()
    changed = recipe.load(case.path, overrides.split())
    assert changed.architecture.criterion == "taylor" and changed.phases == case.settings.phases


def test_head_gives_data_command_and_published_result(case):
    row = next(r for r in case.table.rows if r.penalty_weight and float(r.penalty_weight) == case.expected.penalty_weight)
    figures = [f"{row.top1} % top-1", f"{row.top5} % top-5", f"{row.params} M parameters"]
    if row.flops:
        figures += [f"{row.flops} {case.table.columns['flops']} FLOPs ({row.flops_ratio} times fewer)"]
        figures += [f"{row.params} M parameters ({row.params_ratio} times fewer)"]
    text = re.sub(r"\s*\n#\s*", " ", case.head)
    for words in [
        *figures,
        case.table.title,
        "arXiv 2103.02126",
        f"recipes/{case.path.name}",
        "data_tools.make_shards",
        "GPU",
        "hour",
    ]:
        assert words in text, words
