"""What is compared: settings by name, seeds and the number of updates, from a YAML file or by default.

    updates: 20
    seeds: [42, 43]
    common: {learning_rate: 1.0e-3}                   # fields of TrustKLPPOConfig, for all settings
    settings:                                         # name: fields of TrustKLPPOConfig
      anchor + clip: {kl_coef: 0.05, clip_rule: ppo}
      clip only:     {kl_coef: 0.0, clip_rule: ppo}

Every key may be left out. Without `settings`, the four corners of anchor × trust region are compared. What a setting leaves
open is as the task sets it. Raises `ConfigError`, which names the key, the value, the valid range and the likely fix.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, out_of_range, unknown_name

UPDATES = 20
SEEDS = (42,)
KEYS = ("updates", "seeds", "common", "settings")
RESERVED = {"seed": "`seeds`", "max_steps": "`updates`", "output_dir": "--output-dir"}
# nats per token. What KL(π_old‖π) could be at most if every ratio stayed within 1 ± 0.2, the range of PPO's clip: that is
# bounds.ratio_range_bounds(0.2).kl = 0.0204. The clip does not see to it; the share of updates beyond it tells how often not.
LIMIT = 0.02
NAME_LENGTH = 60  # characters of a setting's name: it becomes a folder, and the head of a row

# Without a limit on the gradient's norm, which would be a third mechanism in all of them.
CORNERS: dict[str, dict[str, Any]] = {
    "anchor + clip": {"kl_coef": 0.05, "clip_rule": "ppo", "max_grad_norm": None},
    "clip only": {"kl_coef": 0.0, "clip_rule": "ppo", "max_grad_norm": None},
    "anchor only": {"kl_coef": 0.05, "clip_rule": "none", "max_grad_norm": None},
    "neither": {"kl_coef": 0.0, "clip_rule": "none", "max_grad_norm": None},
}


class Comparison(NamedTuple):
    """settings: name → fields of the configuration, those common to all included."""

    updates: int
    seeds: tuple[int, ...]
    settings: dict[str, dict[str, Any]]


def read(
    path: str | os.PathLike[str] | None = None, *, updates: int | None = None, seeds: Sequence[int] | None = None
) -> Comparison:
    """The comparison that a YAML file describes; `updates` and `seeds` given here take the place of the file's."""
    document = {} if path is None else _document(Path(path))
    updates = document.get("updates", UPDATES) if updates is None else updates
    seeds = document.get("seeds", SEEDS) if seeds is None else seeds
    _integer("updates", updates, 1)
    if not isinstance(seeds, (list, tuple)) or not seeds:
        raise out_of_range("seeds", seeds, "a list of integers", "One seed is seeds: [42].")
    for number, seed in enumerate(seeds):
        _integer("seeds", seed, 0)
        if seed in seeds[:number]:
            raise ConfigError(f"`seeds` got {seed} twice; a seed says something once, so leave one out.")
    common = _fields("common", document.get("common", {}))
    settings = document.get("settings", CORNERS)
    _check_names(settings)
    return Comparison(
        updates,
        tuple(seeds),
        {name: common | _fields(f"settings → {name}", fields) for name, fields in settings.items()},
    )


def slug(name: str) -> str:
    """The setting's name as that of a folder: "anchor + clip" becomes "anchor-and-clip"."""
    return re.sub(r"[^\w]+", "-", name.lower().replace("+", " and ")).strip("-_")


def validate(comparison: Comparison, build: Callable[..., Any] | None = None) -> Comparison:
    """Every setting's configuration, made once before anything runs; returns the settings as they will be used.

    build: (output_dir, **fields) -> TrustKLPPOConfig, the task's own where it is known. Otherwise each setting is held to
    the configuration's defaults: fields that only make sense together are to be given together.
    """
    from .. import TrustKLPPOConfig

    # On any machine, whether or not it computes in bf16: that is for the run to find out.
    portable = {"use_cpu": True, "bf16": False}

    def by_defaults(output_dir: str, **fields: Any) -> Any:
        return TrustKLPPOConfig(output_dir=output_dir, **portable | fields)

    settings = {}
    for name, fields in comparison.settings.items():
        try:
            # As JSON gives them back: a run keeps what it was made with, to be compared with what is asked for.
            settings[name] = json.loads(json.dumps(_typed(fields, TrustKLPPOConfig), allow_nan=False))
            (build or by_defaults)(os.devnull, **settings[name])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"setting {name!r}: {error}") from None
    return comparison._replace(settings=settings)


def _document(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.load(path.read_bytes(), _loader())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a YAML file, or none.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict) or not document:
        got = "nothing" if document is None else f"a {type(document).__name__}"
        raise ConfigError(f"{path} holds {got}; it must be a mapping with any of {', '.join(KEYS)}.")
    for key in document:
        if key not in KEYS:
            raise unknown_name(str(path), key, KEYS)
    for key in ("common", "settings"):
        if key in document and (not isinstance(document[key], dict) or not document[key]):
            raise ConfigError(f"`{key}` got {document[key]!r}; it must be a mapping with an entry. Fix: leave it out.")
    return document


def _loader() -> Any:
    """PyYAML's safe loader, which refuses a key that stands twice instead of forgetting the first."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, (str, int, float)) and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key if isinstance(key, (str, int, float)) else None)
            return super().construct_mapping(node, deep)

    return Loader


def _integer(field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
        raise out_of_range(field, value, f"an integer from {least} to 2**32 − 1")


def _check_names(settings: Mapping[Any, Any]) -> None:
    folders: dict[str, str] = {}
    for name in settings:
        if not isinstance(name, str) or not slug(name) or len(name) > NAME_LENGTH:
            raise out_of_range(
                "settings", name, f"a name with a letter or a digit, at most {NAME_LENGTH} characters of text",
                "Put a number in quotes." if not isinstance(name, str) else "",
            )  # fmt: skip
        if (other := folders.setdefault(slug(name), name)) != name:
            raise ConfigError(
                f"`settings` got {other!r} and {name!r}, which would share the folder {slug(name)!r}; rename one of them."
            )


def _fields(where: str, fields: object) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise out_of_range(where, fields, "a mapping of configuration fields", "{} is the task as it is.")
    for field in fields:
        if field in RESERVED:
            raise ConfigError(
                f"`{where}` got {field!r}, which the comparison sets itself; use {RESERVED[field]} instead."
            )
    return fields


def _typed(fields: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The fields, each known, with the numbers that YAML reads as text; what a value must be is left to the configuration."""
    from dataclasses import fields as fields_of
    from typing import get_type_hints

    known = [field.name for field in fields_of(config) if field.init]  # type: ignore[arg-type]  # a dataclass
    hints, typed = get_type_hints(config), dict(fields)
    for name, value in fields.items():
        if name not in known:
            raise unknown_name("field of TrustKLPPOConfig", name, known)
        if isinstance(value, str) and hints[name] in (float, float | None):
            with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3, without a point, as text
                typed[name] = float(value)
    return typed
