"""Pages of reference say what the code says."""

import ast
import re
from pathlib import Path

import pytest
from test_docs import FENCE

from dnal_dist import recipe
from dnal_dist.recipe.reference import reference
from dnal_dist.report import outputs

ROOT = Path(__file__).parents[2]


def test_the_page_of_recipes_is_current():
    """If not: python -m dnal_dist.recipe --describe > docs/recipe.md"""
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == reference()


def texts() -> str:
    """All texts of the program, with ... for what is filled in."""
    found = []
    for folder in ("dnal_dist", "data_tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(one.value if isinstance(one, ast.Constant) else "..." for one in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_the_programs():
    page, known = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), texts()
    seen = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    messages = [message for cell in seen for message in re.findall(r"`([^`]*)`", cell) if "..." in message]
    assert len(messages) > 20
    for message in messages:
        for part in re.split(r"\.\.\.", message.removeprefix("error: ")):
            assert part in known, f"no message of the program has {part!r}: {message}"


def test_the_python_page_runs(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "write_all", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    names = {}
    for language, block in FENCE.findall((ROOT / "docs/python.md").read_text(encoding="utf-8")):
        assert language == "python"
        exec(compile(block, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "of 355" in said and "\nTrue\n" in said
    assert names["result"].cost.macs <= names["cost"].count(names["gated"], 8).macs / 4
    assert round(names["right"] / 355, 6) == names["result"].accuracy


@pytest.mark.parametrize("name", ["resnet50_imagenet", "mobilenetv2_imagenet"])
def test_modern_recipes_train_the_papers_networks_from_published_weights(name):
    """By options that are all off in the paper's recipes."""
    modern, paper = recipe.load(f"recipes/modern/{name}.yaml"), recipe.load(f"recipes/{name}.yaml")
    assert modern.model.name == paper.model.name == name and modern.model.init_from and modern.architecture.target.macs
    options = ("ema", "label_smoothing", "mixup", "cutmix")
    assert not any(getattr(paper.phases.finetune, option) for option in options) and paper.phases.distillation is None
    assert modern.phases.finetune.ema and modern.phases.finetune.label_smoothing and modern.phases.distillation
    assert modern.phases.finetune.optimizer.nesterov and modern.phases.finetune.schedule.warmup
