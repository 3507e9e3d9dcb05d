"""What a model takes and whether a machine can hold it: Macs of all sizes, decided from headers alone."""

from __future__ import annotations

import json
import re
import shutil
from math import prod
from pathlib import Path

import mlx.core as mx
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.device import Device, device_from_info
from mlxqwen.errors import InsufficientMemoryError, OptionError
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub import resolve_model
from mlxqwen.model.footprint import cache_bytes, measure, size_up
from mlxqwen.model.loading import load_model
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen_convert.sizes import size_of
from tests.command_line import run
from tests.sparse_checkpoints import RELEASES, matrices, norms, write_sparse

GIB = 1 << 30

# What macOS recommends as working set: two thirds of the memory up to 36 GB, three quarters above.
MACS = {
    size: device_from_info(
        {
            "device_name": f"Apple M, {size} GB",
            "memory_size": size * GIB,
            "max_recommended_working_set_size": size * GIB * (2 if size <= 36 else 2.25) / 3,
        },
        is_gpu=True,
        physical=size * GIB,
    )
    for size in (8, 16, 64)
}

# The numbers of parameters that the releases' pages give.
PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}

# The smallest Mac that holds 16, 8 and 4 bits and a cache of 4,096 tokens.
SMALLEST: dict[str, tuple[int | None, int | None, int | None]] = {
    "Qwen3-0.6B": (8, 8, 8),
    "Qwen3-1.7B": (8, 8, 8),
    "Qwen3-4B": (16, 8, 8),
    "Qwen3-8B": (64, 16, 8),
    "Qwen3-14B": (64, 64, 16),
    "Qwen3-32B": (None, 64, 64),
    "Qwen3-30B-A3B": (None, 64, 64),
    "Qwen3-235B-A22B": (None, None, None),
}


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_on_macs(tmp_path: Path, release: str, bits: int) -> None:
    config = RELEASES[release]
    stored = measure(write_sparse(tmp_path / release, config, bits=bits))
    in_matrices, in_norms = (sum(map(prod, shapes(config).values())) for shapes in (matrices, norms))
    assert stored.parameters == in_matrices + in_norms == PARAMETERS[release]
    in_experts = sum(prod(shape) for name, shape in matrices(config).items() if "switch_mlp" in name)
    assert stored.active_parameters == stored.parameters - in_experts * (128 - 8) // 128
    per_weight = 16 if bits == 16 else bits + 2 * 16 / 64
    weights = int(in_matrices * per_weight / 8) + 2 * in_norms
    cache = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 128 * 4096 * 2
    for size, mac in MACS.items():
        needed = size_up(stored, mac, tokens=4096)
        assert (needed.weight_bytes, needed.cache_bytes, needed.dtype) == (weights, cache, mx.bfloat16)
        smallest = SMALLEST[release][(16, 8, 4).index(bits)]
        assert needed.fits == (smallest is not None and size >= smallest)
    assert stored.bits_per_weight == pytest.approx(per_weight, rel=2e-3)
    assert stored.format == ("BF16" if bits == 16 else f"MLX {bits}-bit, groups of 64")
    assert stored.runs


def test_on_a_cpu_floats_grow_to_float32(tmp_path: Path) -> None:
    machine = Device("a CPU", False, 16 * GIB, 14 * GIB)
    stored = measure(write_sparse(tmp_path / "model", RELEASES["Qwen3-0.6B"]))
    needed = size_up(stored, machine, tokens=1)
    assert (needed.dtype, needed.weight_bytes) == (mx.float32, 2 * stored.disk_bytes)
    assert size_up(stored, machine, dtype="float16").weight_bytes == stored.disk_bytes
    assert size_up(stored, machine).tokens == 40_960
    with pytest.raises(OptionError, match="context"):
        size_up(stored, machine, tokens=0)


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_cache_takes_what_was_foretold(kv_bits: int | None) -> None:
    config = ModelConfig.from_dict(
        {**RELEASES["Qwen3-0.6B"], "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 9}
    )
    model = Qwen3ForCausalLM(config)
    model.set_dtype(mx.float32)
    cache = make_cache(model, kv_bits=kv_bits)
    cache.reserve(512)
    mx.eval(model(mx.zeros((1, 3), dtype=mx.int32), cache))
    assert cache.nbytes == cache_bytes(config, 512, 4, kv_bits)


@pytest.mark.parametrize(("form", "bits", "name"), [("fp8", 8, "FP8"), ("awq", 4, "AWQ")])
def test_foreign_formats_are_told_of(tmp_path: Path, form: str, bits: int, name: str) -> None:
    folder = write_sparse(tmp_path / "model", RELEASES["Qwen3-8B"], bits=bits, form=form)
    facts = json.loads(run("info", str(folder), "--json").out)
    assert (facts["format"], facts["runs"]) == (name, False)
    assert facts["parameters"] == PARAMETERS["Qwen3-8B"]
    assert 0.9 * bits < facts["bits_per_weight"] < 1.5 * bits + 3
    table = run("info", str(folder)).out
    assert facts["converts"]
    assert f"{name} (converted once, when it is first loaded)" in table


def test_foreign_formats_by_their_tensors(tmp_path: Path) -> None:
    for form, bits, name in (("fp8", 8, "FP8"), ("awq", 4, "AWQ")):
        folder = write_sparse(tmp_path / form, RELEASES["Qwen3-0.6B"], bits=bits, form=form)
        (folder / "config.json").write_text(json.dumps(RELEASES["Qwen3-0.6B"]))
        stored = measure(folder)
        assert (stored.format, stored.runs) == (name, False)


def test_load_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sparse(tmp_path / "model", RELEASES["Qwen3-8B"])
    with pytest.raises(InsufficientMemoryError, match=r"16\.4 GB in bfloat16.* 11\.5 GB"):
        load_model(folder, device=MACS[16])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model(None) / name, folder)
    monkeypatch.setattr("mlxqwen.model.loading.current_device", lambda: MACS[8])
    result = run("generate", "hi", "--model", str(folder))
    assert (result.status, result.out) == (1, "")
    assert "force" in result.err
    assert len(result.err.splitlines()) == 2


def test_force_loads_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.model.loading.current_device", lambda: Device("a watch", False, 1 << 20, 1 << 20))
    assert run("generate", "hi", "--max-tokens", "1").status == 1
    assert run("generate", "hi", "--max-tokens", "1", "--force").status == 0


def test_table_and_json_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen.device.current_device", lambda: MACS[16])
    facts = json.loads(run("info", "--json", "--context", "100", "--kv-bits", "8").out)
    result = run("info", "--context", "100", "--kv-bits", "8")
    assert (result.status, result.err) == (0, "")
    rows = {line[:18].strip(): line[19:] for line in result.out.splitlines()}
    assert rows["fits"].startswith("yes, ")
    assert rows["this machine"] == "Apple M, 16 GB (GPU), 11.45 GB usable"
    assert rows["cache in memory"].endswith("for 100 tokens")
    assert facts["cache_tokens"] == 100
    assert facts["total_bytes"] == facts["weight_bytes"] + facts["cache_bytes"]
    assert facts["fits"] is True
    assert facts["device"]["usable_memory"] == 16 * GIB * 2 // 3


@pytest.mark.parametrize("arguments", [["--context", "0"], ["/no/such/folder"], ["/\udcff"], ["--revision", "main"]])
def test_bad_input(arguments: list[str]) -> None:
    result = run("info", *arguments)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) <= 2


def test_the_option_is_named_before_a_model_is_looked_for() -> None:
    assert run("info", "org/none", "--context", "0").err == "error: --context: found 0, expected an integer from 1\n"


def test_sizes_beyond_gigabytes() -> None:
    assert [size_of(n) for n in (999, 10**12 - 10**10, 4 * 10**15)] == ["999 bytes", "990.00 GB", "4000.00 TB"]


def test_names_cannot_forge_rows(tmp_path: Path) -> None:
    folder = write_sparse(tmp_path / "model\nfits yes", RELEASES["Qwen3-0.6B"])
    assert len(run("info", str(folder)).out.splitlines()) == 10


@pytest.mark.parametrize("content", [None, "{"])
def test_a_model_that_cannot_be_asked_is_told(tmp_path: Path, content: str | None) -> None:
    demo = resolve_model(None)
    for path in demo.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    refused = run("generate", "hi", "--model", str(tmp_path))
    problem = refused.err.splitlines()[0].removeprefix("error: ")
    assert problem.startswith(f"{tmp_path}/tokenizer.json: ")
    result = run("info", str(tmp_path))
    assert result.status == 0
    (fits,) = (line[19:] for line in result.out.splitlines() if line.startswith("fits "))
    assert re.match(r"in memory, \S+ MB needed; generate and chat cannot use it: ", fits)
    assert problem in fits
    facts = json.loads(run("info", str(tmp_path), "--json").out)
    assert (facts["fits"], facts["runs"]) == (True, True)
    assert facts["tokenizer_error"].startswith(f"{problem}. ")
    assert json.loads(run("info", "--json").out)["tokenizer_error"] is None


def test_a_model_without_a_chat_template_is_told(tmp_path: Path) -> None:
    for path in resolve_model(None).iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    facts = json.loads(run("info", str(tmp_path), "--json").out)
    assert (facts["tokenizer_error"], facts["fits"]) == (None, True)
    assert facts["notes"] == ["there is no chat template: text is continued (generate --raw), and chat needs one"]
    assert run("generate", "hi", "--model", str(tmp_path)).err.startswith(f"error: {tmp_path}: no chat template")
    assert run("generate", "--raw", "hi", "--model", str(tmp_path), "--max-tokens", "1").status == 0


def test_a_model_is_named_as_people_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("info").out.splitlines()[0].split(maxsplit=1)[1] == "the demo model"
    snapshot = write_sparse(
        tmp_path / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc", RELEASES["Qwen3-0.6B"], bits=4
    )
    facts = json.loads(run("info", str(snapshot), "--json").out)
    assert (facts["model"], facts["path"]) == ("Qwen/Qwen3-0.6B", str(snapshot))
    other = write_sparse(tmp_path / "mine", RELEASES["Qwen3-0.6B"], bits=4)
    assert json.loads(run("info", str(other), "--json").out)["model"] == str(other)


@pytest.mark.parametrize(
    ("tokens", "factor", "told"),
    [
        (512, 1, "512 tokens"),
        (513, 2, "512 tokens; 513 need YaRN: --yarn auto, or --yarn-factor 2"),
        (1_025, 4, "512 tokens; 1,025 need YaRN: --yarn auto, or --yarn-factor 4"),
        (2_049, None, "512 tokens; 2,049 are more than YaRN is made for"),
    ],
)
def test_a_context_that_needs_yarn_is_told(tokens: int, factor: int | None, told: str) -> None:
    rows = {line[:18].strip(): line[19:] for line in run("info", "--context", str(tokens)).out.splitlines()}
    assert rows["context"] == told
    assert json.loads(run("info", "--context", str(tokens), "--json").out)["yarn_factor"] == factor


def test_the_table_of_what_fits_is_the_one_of_today() -> None:
    from make_fit_table import ROOT, TABLE, table

    found = TABLE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    rows = found[0].splitlines()
    assert [row.split()[1] for row in rows[2:]] == [*RELEASES]
    assert {*table(["Qwen3-8B", "Qwen3-32B"]).splitlines()} <= {*rows}
