"""What is compared: settings, seeds and the number of updates of a run.

    trainer: ppo                           # or grpo, rloo
    updates: 20
    seeds: [42, 43]
    common: {learning_rate: 1.0e-3}        # fields of TrustKLPPOConfig, for all settings
    settings:                              # name: fields of TrustKLPPOConfig
      anchor + clip: {kl_coef: 0.05, clip_rule: ppo}
      clip only:     {kl_coef: 0.0, clip_rule: ppo}

Every key is optional. Without `settings`, the four combinations of anchor and
clip, each on and off, are compared; with grpo and rloo, those of anchor and
hard limit. Fields that a setting does not give have the task's values. Those of
grpo and rloo are the fields of TrustKLGRPOConfig and TrustKLRLOOConfig.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from ..errors import ConfigError, out_of_range, unknown_name

UPDATES = 20
SEEDS = (42,)
KEYS = ("updates", "seeds", "common", "settings", "trainer")
RESERVED = {"seed": "`seeds`", "max_steps": "`updates`", "output_dir": "--output-dir"}
# nats per token: about bounds.ratio_range_bounds(0.2).kl = 0.0204, the largest KL(π_old‖π) if every ratio stayed within PPO's
# clip range of 1 ± 0.2. The clip does not enforce this; the share of updates over the limit shows how often it is exceeded.
LIMIT = 0.02
NAME_LENGTH = 60  # characters of a setting's name, which becomes a folder and the head of a row

# Without a limit on the gradient's norm, which would be a third mechanism in all settings.
CORNERS: dict[str, dict[str, Any]] = {
    "anchor + clip": {"kl_coef": 0.05, "clip_rule": "ppo", "max_grad_norm": None},
    "clip only": {"kl_coef": 0.0, "clip_rule": "ppo", "max_grad_norm": None},
    "anchor only": {"kl_coef": 0.05, "clip_rule": "none", "max_grad_norm": None},
    "neither": {"kl_coef": 0.0, "clip_rule": "none", "max_grad_norm": None},
}


LIMITED_CORNERS: dict[str, dict[str, Any]] = {
    "anchor + limit": {"beta": 0.04, "trust_max_kl": LIMIT},
    "limit only": {"beta": 0.0, "trust_max_kl": LIMIT},
    "anchor only": {"beta": 0.04},
    "neither": {"beta": 0.0},
}
"""Those of GRPO and RLOO, whose clip cannot act with one optimizer step for each batch, TRL's default."""

CONFIGS = {"ppo": "TrustKLPPOConfig", "grpo": "TrustKLGRPOConfig", "rloo": "TrustKLRLOOConfig"}
"""The configuration of each trainer, by its name in this package."""


class Comparison(NamedTuple):
    """settings: name → fields of the configuration, including those common to all. trainer: a key of CONFIGS."""

    updates: int
    seeds: tuple[int, ...]
    settings: dict[str, dict[str, Any]]
    trainer: str = "ppo"


def read(
    path: str | os.PathLike[str] | None = None, *, updates: int | None = None, seeds: Sequence[int] | None = None
) -> Comparison:
    """The comparison that a YAML file describes; `updates` and `seeds` override those of the file."""
    document = {} if path is None else _document(Path(path))
    updates = document.get("updates", UPDATES) if updates is None else updates
    seeds = document.get("seeds", SEEDS) if seeds is None else seeds
    _check_integer("updates", updates, 1)
    if not isinstance(seeds, (list, tuple)) or not seeds:
        raise out_of_range("seeds", seeds, "a list of integers", "One seed is seeds: [42].")
    for number, seed in enumerate(seeds):
        _check_integer("seeds", seed, 0)
        if seed in seeds[:number]:
            raise ConfigError(f"`seeds` got {seed} twice; leave one out.")
    common = _fields("common", document.get("common", {}))
    trainer = document.get("trainer", "ppo")
    if not isinstance(trainer, str) or trainer not in CONFIGS:
        raise unknown_name("trainer", trainer, CONFIGS)
    settings = document.get("settings", CORNERS if trainer == "ppo" else LIMITED_CORNERS)
    _check_names(settings)
    complete = {name: common | _fields(f"settings → {name}", fields) for name, fields in settings.items()}
    return Comparison(updates, tuple(seeds), complete, trainer)


def slug(name: str) -> str:
    """The setting's name as a folder's: "anchor + clip" becomes "anchor-and-clip"."""
    return re.sub(r"[^\w]+", "-", name.lower().replace("+", " and ")).strip("-_")


def validate(comparison: Comparison, build: Callable[..., Any] | None = None) -> Comparison:
    """Build every setting's configuration once, before anything runs; returns the settings as they will be used.

    build: (output_dir, **fields) -> the configuration, that of the task if it is known. By default the other fields have the
    configuration's defaults, so a setting has to give fields that depend on each other together.
    """
    import trl_trustkl

    config = getattr(trl_trustkl, CONFIGS[comparison.trainer])

    def by_defaults(output_dir: str, **fields: Any) -> Any:
        # Whether this machine supports bf16 is checked by the run.
        return config(output_dir=output_dir, **{"use_cpu": True, "bf16": False} | fields)

    settings = {}
    for name, fields in comparison.settings.items():
        try:
            # As they are read from JSON, since they are compared with what a finished run was made with.
            settings[name] = json.loads(json.dumps(_typed(fields, config), allow_nan=False))
            (build or by_defaults)(os.devnull, **settings[name])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"setting {name!r}: {error}") from None
    return comparison._replace(settings=settings)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_bytes(), _Loader)
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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also rejects a key that occurs twice instead of ignoring the first one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)):
                if key in seen:
                    problem = f"the key {key!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def _check_integer(field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
        raise out_of_range(field, value, f"an integer from {least} to 2**32 − 1")


def _check_names(settings: Mapping[Any, Any]) -> None:
    folders: dict[str, str] = {}
    for name in settings:
        if not isinstance(name, str) or not slug(name) or len(name) > NAME_LENGTH:
            valid = f"a name with a letter or a digit, at most {NAME_LENGTH} characters of text"
            raise out_of_range("settings", name, valid, "" if isinstance(name, str) else "Put a number in quotes.")
        if (other := folders.setdefault(slug(name), name)) != name:
            raise ConfigError(
                f"`settings` got {other!r} and {name!r}, which would share the folder {slug(name)!r}; rename one of them."
            )


def _fields(where: str, fields: object) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise out_of_range(where, fields, "a mapping of configuration fields", "{} leaves the task as it is.")
    for field in fields:
        if field in RESERVED:
            raise ConfigError(f"`{where}` got {field!r}, which the comparison sets; use {RESERVED[field]} instead.")
    return fields


def _typed(fields: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The fields, with numbers that YAML reads as text converted. Checks the names; the configuration checks the values."""
    known = [field.name for field in dataclasses.fields(config) if field.init]  # type: ignore[arg-type]  # a dataclass
    hints, typed = get_type_hints(config), dict(fields)
    for name, value in fields.items():
        if name not in known:
            raise unknown_name(f"field of {config.__name__}", name, known)
        if isinstance(value, str) and hints[name] in (float, float | None):
            with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3, which has no point, as text
                typed[name] = float(value)
    return typed
