"""What lies beside the weights: a config that every loader reads, files without code, nothing from elsewhere."""

from __future__ import annotations

import errno
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub_download import COMPANION_FILES, WANTED_FILES
from mlxqwen.model.loading import load_model
from mlxqwen_convert import convert
from mlxqwen_convert.companions import config_text, copy_companions
from mlxqwen_convert.errors import OutputError, SourceError
from mlxqwen_convert.plan import Options, make_plan
from tests.convert.checkpoints import DENSE, MOE, Source, make_source

TOKENS = [[3, 17, 90, 5, 41, 77, 2, 150]]
NO_CODE = {"AutoTokenizer": ["x/y--evil.T", None]}


def logits_of_both(folder: Path) -> tuple[Any, Any]:
    """By mlxqwen and by mlx-lm, both in float32."""
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    tokens = mx.array(TOKENS)
    return np.array(load_model(folder, dtype="float32")(tokens)), np.array(theirs(tokens))


def largest_difference(one: Any, other: Any) -> float:
    """Relative to the largest logit."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def written_config(source: Source, **options: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(config_text(make_plan(source.write().folder, Options(**options))))
    return config


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({**DENSE, "head_dim": 128}, "head_dim"),
        (DENSE, "tie_word_embeddings"),
        ({**MOE, "norm_topk_prob": False}, "norm_topk_prob"),
        (MOE, "mlp_only_layers"),
        (MOE, "decoder_sparse_step"),
        (MOE, "head_dim"),
        (MOE, "tie_word_embeddings"),
    ],
)
@pytest.mark.parametrize("null", [True, False])
def test_what_has_a_default_is_said(tmp_path: Path, config: dict[str, Any], key: str, null: bool) -> None:
    source = make_source(tmp_path / "in", "bf16", config)
    expected = source.config.pop(key)
    if null:
        source.config[key] = None
    convert(source.write().folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == expected
    assert largest_difference(*logits_of_both(tmp_path / "out")) <= 1e-4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        YARN,
        {"rope_type": "yarn", "factor": 4.0},
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 1.5},
        {**YARN, "attention_factor": 0.75},
        {**YARN, "mscale": 0.707},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "moe"])
def test_the_spelling_of_transformers_5(tmp_path: Path, base: dict[str, Any], scaling: dict[str, Any]) -> None:
    source = make_source(tmp_path / "in", "bf16", base)
    source.config["rope_parameters"] = {"rope_theta": source.config.pop("rope_theta"), **scaling}
    source.config["dtype"] = source.config.pop("torch_dtype")
    if "num_experts" in base:
        source.config["num_local_experts"] = source.config.pop("num_experts")
    report = convert(source.write().folder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_parameters"] == source.config["rope_parameters"]
    assert "torch_dtype" not in config
    # without the object, in which newer loaders look first, the same is said
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "num_local_experts")}
    for spelt in (config, old):
        found, meant = ModelConfig.from_dict(spelt), ModelConfig.from_dict(source.config)
        assert (found.rope_theta, found.rope_scaling, found.moe) == (meant.rope_theta, meant.rope_scaling, meant.moe)
    ours, theirs = logits_of_both(tmp_path / "out")
    if follows_yarn(base) or scaling["rope_type"] == "default":
        assert largest_difference(ours, theirs) <= 1e-4
    else:
        assert any("YaRN" in note for note in report.notes)


def follows_yarn(config: dict[str, Any]) -> bool:
    """mlx-lm 0.32 reads `rope_scaling` of a mixture of experts and does nothing with it."""
    return config["model_type"] == "qwen3"


def test_a_ramp_that_mlx_lm_does_not_follow_is_noted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "rope_scaling": {**YARN, "truncate": False}}).write()
    assert any("truncate" in note for note in make_plan(source.folder, Options()).notes)
    assert json.loads(config_text(make_plan(source.folder, Options())))["rope_scaling"]["truncate"] is False


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3Moe"])
def test_what_transformers_saves(tmp_path: Path, kind: str, scaling: dict[str, Any] | None) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = DENSE if kind == "Qwen3" else MOE
    shape = {key: value for key, value in base.items() if key not in ("architectures", "model_type", "torch_dtype")}
    if scaling is not None:
        shape["rope_parameters"] = {"rope_theta": shape.pop("rope_theta"), **scaling}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    for name, weight in model.named_parameters():  # of random signs, so that every expert and position counts
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5 if "embed" in name else 0.15)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    saved = type(model).from_pretrained(tmp_path / "in", dtype=torch.float32)
    with torch.no_grad():
        reference = saved(torch.tensor(TOKENS)).logits.numpy()
    convert(tmp_path / "in", tmp_path / "out", bits=16, dtype="float32")
    ours, theirs = logits_of_both(tmp_path / "out")
    assert largest_difference(ours, reference) <= 1e-4
    if scaling is not None and not follows_yarn(base):
        return
    assert largest_difference(theirs, reference) <= 1e-4
    convert(tmp_path / "in", tmp_path / "quantized", bits=8)
    assert largest_difference(*logits_of_both(tmp_path / "quantized")) <= 1e-4


def test_both_names_of_the_dtype(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "dtype": "bfloat16"})
    config = written_config(source, dtype="float16")
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    del source.config["dtype"], source.config["torch_dtype"]
    config = written_config(source, dtype="float16")
    assert config["torch_dtype"] == "float16"
    assert "dtype" not in config


def test_keys_that_stay_as_they_are(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "rope_theta": 10_000, "x_made_by": {"a": [1, None]}})
    text = config_text(make_plan(source.write().folder, Options()))
    assert '"rope_theta": 10000,' in text
    assert json.loads(text)["x_made_by"] == {"a": [1, None]}


def test_code_in_a_config(tmp_path: Path) -> None:
    sub = {"auto_map": NO_CODE, "kept": 1}
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "sub": sub, "custom_pipelines": {"x": {"impl": "evil.P"}}})
    config = written_config(source)
    assert config["sub"] == {"kept": 1}
    assert "evil" not in json.dumps(config)


FILTERED = ["tokenizer_config.json", "generation_config.json", "chat_template.json", "special_tokens_map.json"]


@pytest.mark.parametrize("name", FILTERED)
@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "auto_map": {"AutoTokenizer": ["x/y--evil.T", null]}}',
        '{"a": 1, "auto\\u005fmap": {"AutoTokenizer": ["x/y--evil.T", null]}}',
        '{"a": 1, "b": [{"auto_map": "evil.T"}]}',
    ],
)
def test_code_in_any_file(tmp_path: Path, name: str, text: str) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (source.folder / name).write_text(text)
    (tmp_path / "out").mkdir()
    copy_companions(source.folder, tmp_path / "out")
    copied = json.loads((tmp_path / "out" / name).read_text())
    assert copied == ({"a": 1, "b": [{}]} if '"b"' in text else {"a": 1})


@pytest.mark.parametrize("name", [*FILTERED, "tokenizer.json", "vocab.json", "LICENSE", "chat_template.jinja"])
def test_what_names_no_code_stays_as_it_is_to_the_byte(tmp_path: Path, name: str) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    data = b'{\r\n  "eos_token":"</s>",\t"\\u00e9": 1.0e3, "\xc3\xa9 auto_map": [ ]\r\n}'
    (source.folder / name).write_bytes(data)
    (tmp_path / "out").mkdir()
    copy_companions(source.folder, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == data


def test_a_token_may_be_called_so(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (source.folder / "vocab.json").write_text('{"auto_map": 7}')
    (tmp_path / "out").mkdir()
    copy_companions(source.folder, tmp_path / "out")
    assert (tmp_path / "out/vocab.json").read_text() == '{"auto_map": 7}'


def plan_error(source: Source, output: Path) -> str:
    """What is said before any weight is read, and nothing is written."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(SourceError) as raised:
        convert(source.folder, output)
    with pytest.raises(SourceError):
        make_plan(source.folder, Options())
    assert sorted(output.parent.iterdir()) == before
    return str(raised.value)


@pytest.mark.parametrize("name", FILTERED)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"auto_map":' + "[" * 200_000 + "]" * 200_000 + "}", "nested deeper"),
        ("[" + "[]," * 1_000_000 + "[]]", "larger"),
        ('{"a": 1', "delimiter"),
        ('{"auto_map": 1, "auto_map": 2}', "twice"),
    ],
    ids=["deep", "long", "cut", "twice"],
)
def test_json_out_of_bounds(tmp_path: Path, name: str, text: str, said: str) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    text = text + " " * ((4 << 20) if said == "larger" else 0)
    (source.folder / name).write_text(text)
    message = plan_error(source, tmp_path / "out")
    assert name in message
    assert said in message


def test_files_of_sizes_that_none_has(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (source.folder / "vocab.json").write_bytes(b"")
    os.truncate(source.folder / "vocab.json", 300 << 20)
    assert "vocab.json: larger than" in plan_error(source, tmp_path / "out")


def test_pointers_in_place_of_files(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (source.folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git-lfs pointer" in plan_error(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_out_of_the_folder(tmp_path: Path, name: str, relative: bool) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "secret").write_text('{"key": "private"}')
    (source.folder / name).unlink(missing_ok=True)
    (source.folder / name).symlink_to("../secret" if relative else tmp_path / "secret")
    message = plan_error(source, tmp_path / "out")
    assert f"{name}: is a link to {tmp_path / 'secret'}" in message
    (tmp_path / "target").mkdir()
    with pytest.raises(SourceError, match="is a link"):
        copy_companions(source.folder, tmp_path / "target")
    assert not (tmp_path / "target" / name).exists()


def test_templates_in_a_folder_that_is_elsewhere(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/tool_use.jinja").write_text("{{ tools }}")
    (source.folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert "tool_use.jinja: is a link" in plan_error(source, tmp_path / "out")


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--Qwen--Qwen3-0.6B"
    source = make_source(cache / "snapshots" / "abc", "bf16").write()
    (cache / "blobs").mkdir()
    for name in ("LICENSE", "tokenizer_config.json"):
        (source.folder / name).rename(cache / "blobs" / name[:3])
        (source.folder / name).symlink_to(f"../../blobs/{name[:3]}")
    (source.folder / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "model").symlink_to(source.folder)
    for number, folder in enumerate((source.folder, tmp_path / "model")):
        make_plan(folder, Options())
        target = tmp_path / f"out{number}"
        target.mkdir()
        copy_companions(folder, target)
        assert (target / "LICENSE").read_text() == (target / "NOTICE").read_text() == "Do as you like."
        assert not any(path.is_symlink() for path in target.iterdir())
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    (source.folder / "NOTICE").unlink()
    (source.folder / "NOTICE").symlink_to("../../refs/main")
    with pytest.raises(SourceError, match="is a link"):
        make_plan(source.folder, Options())


def test_a_disk_that_fails_while_they_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    (tmp_path / "out").mkdir()

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        copy_companions(source.folder, tmp_path / "out")


def test_the_hub_is_asked_for_all_of_them() -> None:
    for name in (*COMPANION_FILES, "README.md", "additional_chat_templates/tool_use.jinja"):
        assert any(fnmatch(name, pattern) for pattern in WANTED_FILES), name
