"""The fields for rollouts by vLLM: GRPOConfig's names and defaults, and errors for fields that would be ignored."""

from __future__ import annotations

from typing import Any

import pytest
from trl import GRPOConfig

from tests import tiny
from tests.trl_fields import default, fields
from trl_trustkl import TrustKLPPOConfig
from trl_trustkl.errors import ConfigError
from trl_trustkl.ppo.training_fields import TrainingFields
from trl_trustkl.ppo.vllm_fields import CORRECTION, VLLMFields, changed

OURS = {name: each for name, each in fields(VLLMFields).items() if name not in fields(TrainingFields)}
SERVER = {
    "vllm_server_base_url": "http://there:1", "vllm_server_host": "there", "vllm_server_port": 1, "vllm_server_timeout": 3.0,
    "vllm_group_port": 5,
}  # fmt: skip
COLOCATE = {
    "vllm_model_impl": "transformers", "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 99, "vllm_tensor_parallel_size": 2,
}  # fmt: skip
OTHERS = {
    "use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.5,
}  # fmt: skip
EACH = {**SERVER, **COLOCATE, **OTHERS}
"""Every field, with a value that is not its default."""
TESTED = {
    **dict.fromkeys(
        ["use_vllm", "vllm_model_impl", "vllm_gpu_memory_utilization", "vllm_max_model_length"],
        "rollout/test_engines.py::test_a_run_with_a_colocated_vllm",
    ),
    **dict.fromkeys(
        ["vllm_enable_sleep_mode", "vllm_tensor_parallel_size"],
        "rollout/test_engines.py::test_a_colocated_vllm_gets_the_settings_of_its_devices",
    ),
    **dict.fromkeys(
        ["vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"],
        "rollout/test_engines.py::test_a_run_with_a_server",
    ),
    "vllm_server_base_url": "rollout/test_engines.py::test_a_server_may_have_an_address_instead_of_host_and_port",
    "vllm_group_port": "rollout/test_engines.py::test_from_a_gpu_weights_go_through_the_group_port",
}
"""The test that fails if a field has no effect, for test_config_fields.py."""


def vllm(folder: Any, **changes: Any) -> TrustKLPPOConfig:
    return tiny.config(folder, use_vllm=True, **changes)


def server(folder: Any, **changes: Any) -> TrustKLPPOConfig:
    return vllm(folder, vllm_mode="server", **changes)


def test_the_fields_are_those_of_grpo_with_its_defaults_except_for_one():
    theirs = fields(GRPOConfig)
    assert OURS.keys() == EACH.keys() and OURS.keys() <= theirs.keys()
    other = {name: default(each) for name, each in OURS.items() if default(each) != default(theirs[name])}
    assert other == {"vllm_importance_sampling_mode": "token_truncate"}


def test_a_field_that_was_changed_is_found(tmp_path):
    args = vllm(tmp_path, vllm_max_model_length=99)
    assert changed(args, tuple(EACH)) == ["vllm_max_model_length", "use_vllm"]
    assert set(CORRECTION) == {name for name in EACH if "importance" in name}


# -- fields that would be ignored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vllm_mode", *SERVER, *COLOCATE])
def test_a_field_of_vllm_without_it_is_an_error(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        tiny.config(tmp_path, **{name: EACH[name]})
    assert str(error.value) == (
        f"`{name}` got {EACH[name]!r}, which only use_vllm=True uses; set use_vllm=True, or leave {name} out."
    )


@pytest.mark.parametrize("name", [*SERVER, *COLOCATE])
def test_a_field_of_the_other_mode_is_an_error(tmp_path, name):
    own, other = ("server", "colocate") if name in SERVER else ("colocate", "server")
    vllm(tmp_path, vllm_mode=own, **{name: EACH[name]})
    with pytest.raises(ConfigError) as error:
        vllm(tmp_path, vllm_mode=other, **{name: EACH[name]})
    assert str(error.value) == (
        f"`{name}` got {EACH[name]!r}, which only vllm_mode='{own}' uses; set vllm_mode='{own}', or leave {name} out."
    )


@pytest.mark.parametrize(
    ("name", "value"), [("local_rollout_forward_batch_size", 3), ("ds3_gather_for_generation", False)]
)
def test_a_field_of_transformers_is_an_error_with_vllm(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"`{name}` got {value} with use_vllm=True, .*leave it out"):
        vllm(tmp_path, **{name: value})


@pytest.mark.parametrize("name", CORRECTION[1:])
def test_a_field_of_the_correction_without_it_is_an_error(tmp_path, name):
    with pytest.raises(
        ConfigError, match=f"`{name}` got {EACH[name]!r}, but vllm_importance_sampling_correction=False ignores"
    ):
        tiny.config(tmp_path, vllm_importance_sampling_correction=False, **{name: EACH[name]})
    tiny.config(tmp_path, **{name: EACH[name]})  # an engine of the user may need it


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["localhost:8000", "there", "ftp://there:1", "http://", "http://:8000", "http://there:port", "http://there:0",
            "http://there:70000", "//there", ""],
)  # fmt: skip
def test_an_address_needs_a_scheme_and_a_host(tmp_path, url):
    with pytest.raises(ConfigError) as error:
        server(tmp_path, vllm_server_base_url=url)
    assert str(error.value) == (
        f"`vllm_server_base_url` got {url!r}; it must be an address such as 'http://localhost:8000', or None."
    )


@pytest.mark.parametrize("url", ["http://there", "https://there:1", "http://10.0.0.1:8000/path", "http://[::1]:8000"])
def test_addresses_that_are_ones(tmp_path, url):
    assert server(tmp_path, vllm_server_base_url=f"{url}/").vllm_server_url == url


def test_the_address_is_made_of_host_and_port_unless_it_is_given(tmp_path):
    assert server(tmp_path).vllm_server_url == "http://0.0.0.0:8000"
    for host in ("there", "node-1.cluster_2", "10.0.0.1", "[::1]"):
        assert server(tmp_path, vllm_server_host=host, vllm_server_port=81).vllm_server_url == f"http://{host}:81"


@pytest.mark.parametrize("host", ["http://there", "there:8000", "there/path", "", "two words", "::1"])
def test_a_host_is_a_name_and_no_address(tmp_path, host):
    with pytest.raises(ConfigError) as error:
        server(tmp_path, vllm_server_host=host)
    assert str(error.value) == (
        f"`vllm_server_host` got {host!r}; it must be a name such as 'localhost', or an IP address. An address with 'http://' "
        "belongs in vllm_server_base_url."
    )


@pytest.mark.parametrize("name", ["vllm_server_host", "vllm_server_port"])
def test_an_address_and_a_part_of_it_are_an_error(tmp_path, name):
    with pytest.raises(
        ConfigError, match=f"`{name}` got {EACH[name]!r} together with vllm_server_base_url='http://there:1'"
    ):
        server(tmp_path, vllm_server_base_url="http://there:1", **{name: EACH[name]})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("vllm_server_port", [0, 65536, 1.5]), ("vllm_group_port", [0, 65536]), ("vllm_server_timeout", [0, -1, "5"]),
        ("vllm_gpu_memory_utilization", [0, 1.1]), ("vllm_max_model_length", [0, -5]), ("vllm_tensor_parallel_size", [0]),
        ("vllm_importance_sampling_clip_max", [0, -1.0]), ("vllm_importance_sampling_clip_min", [-0.1]),
        ("vllm_mode", ["cluster"]), ("vllm_model_impl", ["auto"]), ("vllm_importance_sampling_mode", ["token"]),
    ],
)  # fmt: skip
def test_values_outside_of_their_range_are_errors(tmp_path, name, values):
    mode = "server" if name in SERVER else "colocate"
    for value in values:
        with pytest.raises(ConfigError, match=f"`{name}` got {value!r}; it must be"):
            vllm(tmp_path, **{"vllm_mode": mode, name: value})


@pytest.mark.parametrize(("low", "high"), [(3.0, 3.0), (4.0, 3.0), (5.0, 4.0)])
def test_the_lower_bound_of_ratios_is_below_the_upper_one(tmp_path, low, high):
    given = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    with pytest.raises(ConfigError, match=f"`vllm_importance_sampling_clip_min` got {low}; it must be below vllm_importance_"
                       f"sampling_clip_max, which is {high:g}"):  # fmt: skip
        tiny.config(tmp_path, **given)
    tiny.config(tmp_path, **given | {"vllm_importance_sampling_clip_max": None})
    tiny.config(tmp_path, **given | {"vllm_importance_sampling_clip_min": low / 10})


def test_every_field_is_documented_in_its_section():
    for name, each in OURS.items():
        help_text = each.metadata["help"]
        assert help_text.option.group == "rollouts by vLLM" and help_text.endswith("."), name
