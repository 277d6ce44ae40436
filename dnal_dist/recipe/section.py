"""What every part of a recipe is made of."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from dnal_dist.common import errors


class Section(BaseModel):
    """Settings shared by every part of a recipe: frozen, strict, unknown keys refused, field docstrings in the schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


# Marks of keys that do not affect a run's result ("setting": its seeds may differ in them), or that may change when a run resumes
# ("resume"). Shards count by content, which is compared when a run resumes.
FREE = {"free": ["setting", "resume"]}
FREE_IN_SETTING, FREE_AT_RESUME = {"free": ["setting"]}, {"free": ["resume"]}


def _one_line(text: str) -> str:
    if re.search("[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029]", text):
        raise ValueError(f"expected one line without control characters, found {text[:60]!r}")
    if found := errors.secret_in(text):
        raise ValueError(f"an address with {found} in it; remove that: {errors.CREDENTIALS}")
    return text


def one_line_each(value: Any) -> Any:
    """A value of a recipe, in which each text is one line, however deep it lies. Raises ValueError."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        one_line_each(part)
    return _one_line(value) if isinstance(value, str) else value


OneLine = Annotated[str, AfterValidator(_one_line)]
"""What reaches scripts, terminals, run folders and trackers: no control characters, and no password."""
