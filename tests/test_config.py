# SPDX-License-Identifier: AGPL-3.0-or-later
"""A configuration file is read strictly, completely, and with a place for every complaint."""

import re
from pathlib import Path

import pytest

from fsdet import config, yaml_strict
from fsdet.config import Config
from fsdet.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "sweep.yaml")  # W&B's, see test_dashboard


def written(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaints(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_shipped_file_loads_and_survives_dump_and_load(path, tmp_path):
    loaded = config.load(path)
    assert config.load(written(tmp_path, config.dump(loaded))) == loaded


def test_the_stages_are_shipped_in_both_sizes_and_follow_each_other():
    for folder in (ROOT / "configs", ROOT / "configs/demo"):
        stages = [config.load(folder / f"stage_{n}.yaml") for n in (1, 2, 3)]
        assert [s.stage.name for s in stages] == ["base", "episodic", "finetune"]
        assert [s.stage.init_from for s in stages[1:]] == [f"{s.run.dir}/best.pt" for s in stages[:2]]
        assert len({s.data.image_size for s in stages}) == 1 and stages[1].model == stages[2].model
        added = {"refine": "auto", "objectness": "auto"}  # with the episodes; the rest is the same detector
        assert stages[0].model.model_copy(update=added) == stages[1].model != stages[0].model
    assert [config.load(ROOT / f"configs/demo/stage_{n}.yaml").run.dir for n in (1, 2, 3)] == [
        f"checkpoints/stage{n}" for n in (1, 2, 3)
    ]


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path):
    assert config.load(None) == config.load(written(tmp_path, "")) == Config()
    assert config.load(written(tmp_path, "optim:\n  # lr: 1\nrun:\n")) == Config()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "'1e-4'"])
def test_a_float_may_be_written_as_pyyaml_does_not_read_it(text, tmp_path):
    assert config.load(written(tmp_path, f"optim: {{min_lr: {text}}}")).optim.min_lr == 1e-4
    assert config.load(None, [f"optim.min_lr={text}"]).optim.min_lr == 1e-4


def test_every_problem_is_told_at_once_with_its_line(tmp_path):
    text = """\
run: {devise: cpu}
optim:
  lrr: 1
  lr: -1
  momentum: yes
data:
  image_size: wide
stage: {mode: duel}
seeds: 3
"""
    path = written(tmp_path, text)
    told = complaints(path, "optim.stepz=3")
    for line in (
        f"{path}:1: key 'run.devise': unknown key. Did you mean 'device'?",
        f"{path}:3: key 'optim.lrr': unknown key. Did you mean 'lr'?",
        f"{path}:4: key 'optim.lr': expected greater than 0, got -1.",
        f"{path}:5: key 'optim.momentum': expected no true or false, got True",
        f"{path}:7: key 'data.image_size': expected a whole number",
        f"{path}:8: key 'stage.mode': expected 'standard', 'prototype' or 'dual', got 'duel'. Did you mean 'dual'?",
        f"{path}:9: key 'seeds': unknown key. Did you mean 'eval.seeds'?",
        "override 'optim.stepz=3': key 'optim.stepz': unknown key. Did you mean 'steps'?",
    ):
        assert line in told
    assert told.startswith("8 problems:") and told.count("\n") == 8


def test_a_contradiction_elsewhere_is_told_beside_a_wrong_type():
    with pytest.raises(ConfigError) as told:
        config.load(None, ["optim.steps=abc", "data.image_size=97", "data.workers=x", "episode.shots=[3, 1]"])
    for part in ("optim.steps", "multiple of 32 px, got 97", "data.workers", "expected [least, most]", "4 problems"):
        assert part in str(told.value)


def test_what_hangs_on_a_wrong_key_is_no_contradiction():
    with pytest.raises(ConfigError) as told:
        config.load(None, ["stage.name=episodik", "episode.ways=0", "optim.steps=abc", "optim.epochs=null"])
    assert "2 problems" in str(told.value) and "episode.ways" not in str(told.value)


def test_a_key_given_twice_names_both_lines(tmp_path):
    assert ":3: key 'lr' is given twice, first in line 2" in complaints(written(tmp_path, "optim:\n  lr: 1\n  lr: 2\n"))


@pytest.mark.parametrize(("name", "default"), [("image_size", 640), ("support_size", 320)])
def test_the_side_of_images_has_bounds_and_they_are_told(tmp_path, name, default):
    assert getattr(config.load(None, [f"data.{name}=4096"]).data, name) == 4096
    assert getattr(config.load(None, [f"data.{name}=32"]).data, name) == 32
    told = complaints(written(tmp_path, f"data:\n  {name}: 10000000\n"))
    advice = f"Next: choose a multiple of 32 px; images of any size are scaled to it, {default} is the default"
    bound = "expected less than or equal to 4096"
    assert told == f"{tmp_path / 'c.yaml'}:2: key 'data.{name}': {bound}, got 10000000. {advice}"
    assert complaints(None, f"data.{name}=4128").startswith(f"override 'data.{name}=4128': key 'data.{name}': {bound}")
    assert "greater than or equal to 32, got 0" in complaints(None, f"data.{name}=0")


def test_a_key_given_twice_in_a_parent_file_is_told_there(tmp_path):
    parent = written(
        tmp_path, "run: {seed: 1}\noptim:\n  clip_norm:\n    1: 10\n\n    1: 5\nrun: {seed: 2}\n", "parent.yaml"
    )
    told = complaints(written(tmp_path, "extends: parent.yaml\noptim: {lr: 1}\n", "child.yaml"))
    assert f"{parent}:6: key '1' is given twice, first in line 4" in told
    assert f"{parent}:7: key 'run' is given twice, first in line 1" in told and told.startswith("2 problems:")


def test_extends_is_relative_to_the_file_and_merges_section_by_section(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path, "optim: {lr: 0.5, clip_norm: {1: 10, 20: 5}, lr_scale: {head: 5}}\nrun: {seed: 3}")
    child = written(tmp_path, "extends: ../c.yaml\noptim: {momentum: 0.8, clip_norm: {1: 2}}", "deep/child.yaml")
    optim = config.load(child).optim
    assert (optim.lr, optim.momentum, optim.lr_scale) == (0.5, 0.8, {"head": 5.0})
    assert optim.clip_norm == {1: 2.0}, "a mapping that is a value is replaced, not mixed"
    assert config.load(child).run.seed == 3


def test_a_circle_and_a_missing_parent_are_told_where_they_are_asked_for(tmp_path):
    one = written(tmp_path, "extends: two.yaml", "one.yaml")
    written(tmp_path, "# no\nextends: one.yaml", "two.yaml")
    assert f"{tmp_path / 'two.yaml'}:2: key 'extends': a circle" in complaints(one)
    lost = written(tmp_path, "extends: tow.yaml", "lost.yaml")
    assert f"{lost}:1: expected a config file" in complaints(lost) and "Did you mean 'two.yaml'?" in complaints(lost)
    assert "expected one file name" in complaints(written(tmp_path, "extends: [a, b]"))


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        ((), None, 7.0),
        (("optim.steps=50",), 50, None),
        (("optim.steps=50", "optim.epochs=3"), 50, 3.0),
        (("optim.epochs=3",), None, 3.0),
    ],
)
def test_steps_given_as_override_unset_epochs(overrides, steps, epochs, tmp_path):
    optim = config.load(written(tmp_path, "optim: {epochs: 7}"), overrides).optim
    assert (optim.steps, optim.epochs) == (steps, epochs)


def test_a_child_file_that_sets_epochs_unsets_inherited_steps(tmp_path):
    written(tmp_path, "optim: {steps: 50}", "base.yaml")
    assert config.load(tmp_path / "base.yaml").optim.epochs is None
    optim = config.load(written(tmp_path, "extends: base.yaml\noptim: {epochs: 2}")).optim
    assert (optim.steps, optim.epochs) == (None, 2.0)


def test_overrides_are_yaml_and_reach_into_mappings(tmp_path):
    path = written(tmp_path, "optim: {lr_scale: {neck: 0.1}}")
    loaded = config.load(
        path,
        [
            "optim.lr_scale.head=5",
            "optim.clip_norm={1: 10, 20: 5}",
            "optim.clip_norm.30=1",
            "episode.shots=[1, 3]",
            "stage.freeze=[backbone]",
            "run.dir=123",
            "log.wandb.name=a: b",
            "log.wandb.entity=null",
            "data.augment.mosaic=0",
            "stage.init_from=",
            "data.path=",
        ],
    )
    assert loaded.optim.lr_scale == {"neck": 0.1, "head": 5.0}
    assert loaded.optim.clip_norm == {1: 10.0, 20: 5.0, 30: 1.0}
    assert (loaded.episode.shots, loaded.stage.freeze) == ((1, 3), ["backbone"])
    assert (loaded.run.dir, loaded.log.wandb.name, loaded.log.wandb.entity) == ("123", "a: b", None)
    assert (loaded.data.augment.mosaic, loaded.stage.init_from, loaded.data.path) == (0, None, "")


def test_the_last_override_wins():
    assert config.load(None, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("lr=3", "Did you mean 'optim.lr'?"),
        ("optm.lr=3", "Did you mean 'optim'?"),
        ("optim=3", "expected keys such as 'name:'"),
        ("optim.lr.head=3", "'optim.lr' has no keys below it"),
        ("optim.lr=", "expected a number, got None"),
        ("optim.lr=inf", "expected a finite number"),
        ("model.refine=perhaps", "expected true or false or 'auto', got 'perhaps'"),
        ("data.augment.hsv=[1]", "expected more values, got [1]"),
        ("run={seed: x}", "key 'run.seed': expected a whole number, got 'x'"),
        ("episode.ways=[1", "not valid YAML"),
        ("extends=x.yaml", "unknown key"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, told):
    message = complaints(None, override)
    assert message.startswith(f"override '{override}'") and told in message and "\n" not in message


@pytest.mark.parametrize("value", ["maybe", "-1.5", "[]", "[[1]]", "{x: [2]}", "true", "1e400"])
def test_whatever_a_key_is_given_is_told_in_plain_words(value):
    for key in config.keys():
        try:
            config.load(None, [f"{key}={value}"])
        except ConfigError as error:
            for line in str(error).splitlines():
                assert "Did you mean" in line or re.search(r" problems:|expected [a-z']", line), line
                assert not re.search(r"\bshould\b|\ba valid\b|unable to|Value error", line), line


def test_a_section_named_after_or_before_one_of_its_keys():
    """`data=3 data.path=x` was a traceback, and `data.path=x data={...}` forgot the path."""
    told = complaints(None, "data=3", "data.path=x")
    assert told == "override 'data=3': key 'data': expected keys such as 'path:', got 3"
    got = config.load(
        None, ["data.path=x", "data={image_size: 64, augment: {mosaic: 0.25}}", "data.augment.flip=0"]
    ).data
    assert (got.path, got.image_size, got.augment.mosaic, got.augment.flip) == ("x", 64, 0.25, 0)
    assert config.load(None, ["data.augment.flip=0", "data={augment: {flip: 1}}"]).data.augment.flip == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (("optim.epochs=null",), "in optim.steps, got neither"),
        (("optim.lr=1e-5",), "expected at most optim.lr = 1e-05, got 0.0001"),
        (("episode.shots=[3,1]",), "expected [least, most], got [3, 1]"),
        (("data.image_size=100",), "multiple of 32 px, got 100. Next: 96"),
        (("stage.name=episodic",), "expected at least 1 in stage 'episodic'"),
    ],
)
def test_keys_that_contradict_each_other_are_told(override, told):
    assert told in complaints(None, *override)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: !!python/object/apply:os.system ['touch {marker}']", "tag '!!python/object/apply:os.system' is not"),
        ("run: {{dir: !!python/name:os.system ''}}", "is not allowed"),
        ("run: !mine {{dir: x}}", "tag '!mine' is not allowed"),
        (BOMB, "expected at most 20000 values"),
        ("a: &a [*a]", "nested at most 40 deep"),
        ("[" * 3000, "c.yaml:1"),
        ("x: &x {{seed: 1}}\nrun: {{<<: *x}}", ":2: '<<' is not supported"),
        ("? [a, b]\n: 1", "a key is a single word"),
        ("- a\n- b", "expected keys such as 'optim:', got ['a', 'b']"),
        ("run: {{dir: x", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("run:\n\tdir: x", ":2: not valid YAML"),
        ("run: {{dir: \x07}}", "not valid YAML"),
    ],
)
def test_a_malicious_or_broken_file_is_refused_and_runs_nothing(text, told, tmp_path):
    marker = tmp_path / "ran"
    assert told in complaints(
        written(tmp_path, text.replace("{marker}", str(marker)).replace("{{", "{").replace("}}", "}"))
    )
    assert not marker.exists()


def test_unreadable_files_are_told(tmp_path):
    assert "got no file" in complaints(tmp_path / "none.yaml") and "got no file" in complaints(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in complaints(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"#" * (yaml_strict.MAX_BYTES + 1))
    assert "at most" in complaints(tmp_path / "c.yaml")


def test_a_byte_order_mark_dates_and_clock_times_are_harmless(tmp_path):
    path = written(tmp_path, "\ufeffrun: {dir: 2024-01-02}\nlog: {wandb: {name: 12:30}}")
    assert config.load(path).run.dir == "2024-01-02" and config.load(path).log.wandb.name == "12:30"


def test_a_config_is_frozen_and_every_key_is_listed_once():
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 1
    names = config.keys()
    assert len(names) == len(set(names)) and {"optim.lr", "log.wandb.mode", "loss.weights.dfl"} <= set(names)


@pytest.mark.parametrize("text", ["train: a.json\nnovel: [mug]\n", "names: [a, b]\nnc: 2\nval: v\n"])
def test_a_data_yaml_in_place_of_a_config_is_told_as_what_it_is(text, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(path)
    told = str(error.value)
    assert "expected a config file, got a data YAML (" in told and f"Next: data.path={path} beside a config" in told
    assert "problems" not in told
