from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from paredown.errors import RejectedError, UsageError
from paredown.recipe import Recipe, diff, embedded_names, find_recipe, load_recipe, parse_recipe, recipe_schema
from paredown.strict_yaml import read_yaml

PLAIN = {"schema": 1, "task": "digits"}


def test_embedded_recipes_load_and_survive_a_round_trip():
    assert set(embedded_names()) >= {"digits", "cifar10"}
    for name in embedded_names():
        recipe = load_recipe(name)
        again = load_recipe(read_yaml(recipe.to_yaml()))
        assert again.model_dump() == recipe.model_dump()
        assert again.digest == recipe.digest
        assert diff(recipe, again) == ""
    assert len(load_recipe("digits").prune.levels) == 2


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        load_recipe("digits").seed = 3


def test_every_field_has_a_docstring_with_its_default():
    schema = recipe_schema()
    sections = [schema, *schema["$defs"].values()]
    fields = [(n, f) for s in sections for n, f in s["properties"].items()]
    assert len(fields) > 40
    bare = [n for n, f in fields if not f.get("description") and "$ref" not in f]
    assert bare == []


def test_reading_a_recipe_loads_no_torch():
    code = (
        "import sys; from paredown.recipe import load_recipe; load_recipe('digits'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("prune.criterio=l1", "Did you mean prune.criterion?"),
        ("prun.criterion=l1", "Did you mean prune?"),
        ("criterion=l1", "Did you mean prune.criterion?"),
        ("prune.schedule=gradul", "Did you mean 'gradual'?"),
        ("prune.granularity=4y4", "granularity must be element, N:M"),
        ("prune.granularity=4x4", "must give density, as its granularity is 4x4"),
        ("recover.distil=no", "put a text in quotes"),
        ("recover.lr=1e-3", "write 0.001"),
        ("recover.epochs=1.5", "whole number"),
        ("seed='1'", "Leave out the quotes"),
        ("seed=-1", "greater than or equal to 0"),
        ("device=tpu", "of the form"),
        ("target=tflite", "target must be one of"),
        ("budget.size_bytes=30 XB", "'30 MB' or '30 MiB'"),
        ("prune.levels=3", "must be a list"),
        ("recover=1", "must be a mapping"),
        ("prune.levels.9.macs=0.5", "index a list of 2"),
        ("prune.levels=[{}]", "must give channels, density or modules alone"),
        ("prune.levels=[{channels: 0.5, macs: 0.5}]", "channels and macs"),
        ("prune.levels=[{latency_ms: 4.0}]", "budget.latency_ms bounds the finished file"),
        ("prune.levels=[{latency_ms: 4.0}]", "Budget(latency_ms=…), latency=table)"),
        ("prune.levels=[{size_bytes: 0.5}]", "budget.size_bytes bounds the finished file"),
        ("prune.update=ob", "Did you mean 'obs'?"),
        ("nonsense", "must be key=value"),
        ("a..b=1", "must be key=value"),
        ("recover.lr=.nan", "finite"),
    ],
)
def test_fault_64_mistakes_are_named_with_what_was_meant(override, says):
    with pytest.raises(UsageError) as caught:
        load_recipe("digits", [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "must be a float in (0, 1)"),
        ("1", "ambiguous"),
        ("1.0", "ambiguous"),
        ("-0.1", "must be a float in (0, 1)"),
        ("1.5", "must be a float in (0, 1)"),
        ("25%", "Write 25 % as 0.25"),
        ("1e-3", "YAML reads 1e-3 as text"),
        ("true", "must be a float in (0, 1)"),
    ],
)
def test_fault_67_one_rule_for_amounts(text, says):
    with pytest.raises(UsageError, match=r"^prune\.levels\[0\]\.parameters must be") as caught:
        load_recipe("digits", [f"prune.levels=[{{parameters: {text}}}]"])
    assert says in str(caught.value)


def test_amounts_that_are_right():
    recipe = load_recipe("digits", ["prune.levels=[{macs: 0.5}, {parameters: 20000}]", "budget.size_bytes=30 MiB"])
    assert [level.model_dump(exclude_none=True) for level in recipe.prune.levels] == [
        {"macs": 0.5},
        {"parameters": 20000},
    ]
    assert recipe.budget.size_bytes == 30 * 2**20


def test_all_mistakes_at_once():
    with pytest.raises(UsageError) as caught:
        parse_recipe({**PLAIN, "sed": 1, "prune": {"criterion": 3, "floor": 2}})
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["prune.criterion", "prune.floor", "sed"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema: 1\ntask: digits\nseed: 1\nseed: 2\n", "'seed' is also at line 3"),
        ("schema: 1\ntask: digits\nprune: {floor: 0.1, floor: 0.2}\n", "'floor' is also at line 3"),
        ("schema: 1\nprune:\n\tfloor: 0.1\n", "Got a tab at"),
        ("schema: 1\ntask: !!python/object/apply:os.system [touch canary]\n", "Nothing in a recipe is code"),
        ("schema: 1\ntask: !!python/name:os.system\n", "Nothing in a recipe is code"),
        ("a: &a [x]\nb: [" + ", ".join(["*a"] * 17) + "]\n", "at most 16 aliases"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "merge keys"),
        ("a: " + "[" * 40 + "]" * 40, "nested at most 32"),
        ("a: " + "[" * 100_000, "nested at most 32"),
        ("schema: 1\n---\nschema: 1\n", "single document"),
        ("1: 2\n", "texts as keys"),
        ("- a\n", "must be a mapping"),
        ("a: [1\n", "well formed"),
        ("schema: 1\ntask: digits\nname: 2024-13-45\n", "plain data"),
        ("schema: 1\ntask: digits\nname: 2024-01-02\n", "Put dates and odd keys in quotes"),
        ("", "must be a mapping"),
        ("a: \x00", "well formed"),
        ('a: !!int ""', "plain data"),
        ("a: !!bool x", "plain data"),
        ("a: !!timestamp x", "plain data"),
        ("a: !!map [a]", "plain data"),
        ("a: 2001-01-01 00:00:00 +99:99", "plain data"),
    ],
)
def test_faults_68_and_69_yaml_of_strangers(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert says in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_fault_68_size_and_bytes(tmp_path):
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(50 * 2**20)
    with pytest.raises(UsageError, match=r"1,048,576 bytes. Got 52,428,800"):
        load_recipe(path)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_recipe(path)


def test_fault_70_versions():
    for schema, says in (
        (2, "upgrade"),
        (0, "must be 1"),
        ("1", "must be 1"),
        (None, "Add the line `schema: 1`"),
        (True, "must be 1"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_recipe({"task": "digits", **({} if schema is None else {"schema": schema})})


def test_recipes_that_are_not_there(tmp_path):
    (tmp_path / "mine.yaml").write_text("schema: 1\ntask: digits\n")
    with pytest.raises(UsageError, match=r"Near it: mine\.yaml"):
        find_recipe(tmp_path / "mien.yaml")
    with pytest.raises(UsageError, match=r"folder.*mine\.yaml"):
        find_recipe(tmp_path)
    with pytest.raises(UsageError, match="digits"):
        find_recipe("digit")
    for odd in ("x" * 5000, "a\0b"):
        with pytest.raises(UsageError):
            find_recipe(odd)


@pytest.mark.parametrize("name", ["with space", "naïve ☃", "-rf", "line\nbreak", "x" * 200, "a:b#c"])
def test_fault_74_odd_paths(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "r.yaml").write_text("schema: 1\ntask: digits\ndata: sub\n")
    recipe = load_recipe(folder / "r.yaml")
    assert recipe.data_path == folder / "sub"
    monkeypatch.chdir(tmp_path)
    moved = load_recipe(folder / "r.yaml", [f"data={name}", f"weights={name}/w.pt"])
    assert moved.data_path == folder
    assert moved.weights_path == folder / "w.pt"
    assert load_recipe(read_yaml(moved.to_yaml())).digest == moved.digest


def test_paths_are_relative_to_the_recipe_and_resolved(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "task.py").write_text("x = 1\n")
    (tmp_path / "sub" / "r.yaml").write_text("schema: 1\ntask: ../task.py\nmodel: ../nets.py:small\nweights: w.pt\n")
    recipe = load_recipe(tmp_path / "sub" / "r.yaml")
    assert recipe.task == str(tmp_path / "task.py")
    assert recipe.model == f"{tmp_path / 'nets.py'}:small"
    assert recipe.weights_path == tmp_path / "sub" / "w.pt"
    assert recipe.folder == tmp_path / "sub"
    zoo = load_recipe({**PLAIN, "model": "torchvision:resnet18", "task": "my.tasks"})
    assert (zoo.model, zoo.task) == ("torchvision:resnet18", "my.tasks")


def test_fault_76_a_changed_task_file_is_another_recipe(tmp_path):
    (tmp_path / "task.py").write_text("x = 1\n")
    (tmp_path / "r.yaml").write_text("schema: 1\ntask: task.py\n")
    before = load_recipe(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").digest == before.digest
    (tmp_path / "task.py").write_text("x = 2\n")
    after = load_recipe(tmp_path / "r.yaml")
    assert after.digest != before.digest
    assert "task_sha256" in diff(before, after)
    (tmp_path / "resolved.yaml").write_text(before.to_yaml())
    with pytest.raises(UsageError, match="changed since"):
        load_recipe(tmp_path / "resolved.yaml")
    (tmp_path / "task.py").unlink()
    with pytest.raises(RejectedError, match="readable file"):
        load_recipe(tmp_path / "r.yaml")


def test_fault_76_a_changed_file_of_masks_is_another_recipe(tmp_path, monkeypatch):
    """Its path is relative to the recipe, that of an override to the folder where one is; its content counts."""
    (tmp_path / "sub").mkdir()
    for folder, content in ((tmp_path, b"one"), (tmp_path / "sub", b"two")):
        (folder / "m: 1#.npz").write_bytes(content)
    text = "schema: 1\ntask: digits\nprune: {levels: [{channels: 0.5}, {masks: 'm: 1#.npz'}]}\n"
    (tmp_path / "sub/r.yaml").write_text(text)
    before = load_recipe(tmp_path / "sub/r.yaml")
    assert before.prune.levels[1].masks == str(tmp_path / "sub/m: 1#.npz")
    assert before.prune.levels[1].masks_sha256 == hashlib.sha256(b"two").hexdigest()
    assert (before.prune.granularity, before.prune.granularity_of(before.prune.levels[1])) == ("channel", "element")
    assert load_recipe(read_yaml(before.to_yaml())).digest == before.digest
    monkeypatch.chdir(tmp_path)
    for override in ("prune.levels.1.masks=m: 1#.npz", "prune.levels=[{channels: 0.5}, {masks: 'm: 1#.npz'}]"):
        other = load_recipe(tmp_path / "sub/r.yaml", [override])
        assert other.prune.levels[1].masks == str(tmp_path / "m: 1#.npz") and other.folder == tmp_path / "sub"
        assert "masks_sha256" in diff(before, other)
    (tmp_path / "sub/m: 1#.npz").write_bytes(b"three")
    assert load_recipe(tmp_path / "sub/r.yaml").digest != before.digest
    with pytest.raises(UsageError, match=r"masks_sha256 must fit the masks file.*changed since"):
        load_recipe(read_yaml(before.to_yaml()))
    (tmp_path / "sub/m: 1#.npz").unlink()
    with pytest.raises(RejectedError, match=r"masks must be a readable file.*No such file.*level 2"):
        load_recipe(tmp_path / "sub/r.yaml")


@pytest.mark.parametrize(
    ("level", "says"),
    [
        ({"masks": "m", "channels": 0.5}, "masks must stand alone in a level.*Got them with channels"),
        ({"masks": "m", "factorize": "svd"}, "masks must stand alone in a level.*Got them with factorize"),
        ({"masks": "m", "granularity": "channel"}, "level 1 must have a granularity of masks"),
        ({"masks": ""}, "have at least 1 character"),
        ({"masks_sha256": "0" * 64, "channels": 0.5}, "masks_sha256 must come with masks"),
    ],
)
def test_masks_are_the_amount_of_their_level(level, says):
    with pytest.raises(UsageError, match=says):
        load_recipe({**PLAIN, "prune": {"levels": [level]}})


def test_a_level_without_masks_has_the_digest_that_it_had():
    assert "masks" not in load_recipe({**PLAIN, "prune": {"levels": [{"channels": 0.5}]}}).to_yaml()


def test_the_difference_names_keys():
    a = load_recipe({**PLAIN, "prune": {"levels": [{"macs": 0.5}, {"parameters": 0.5}]}})
    b = load_recipe({**PLAIN, "prune": {"levels": [{"macs": 0.5}, {"parameters": 0.25}]}}, ["seed=3"])
    assert diff(a, b).splitlines() == [
        "  seed: 0 → 3",
        "  prune.levels[1].parameters: 0.5 → 0.25",
    ]
    assert diff(a.to_yaml(), b.to_yaml()) == diff(a, b)
    assert a.digest != b.digest


def test_overrides_read_yaml_but_not_texts():
    recipe = load_recipe(
        "digits", ["prune.exclude=[head.*, '*.bias']", "data=x: [y] # z", "threads=2", "prune.align=null"]
    )
    assert recipe.prune.exclude == ("head.*", "*.bias")
    assert str(recipe.data).endswith("/x: [y] # z")
    assert (recipe.threads, recipe.prune.align) == (2, None)
    with pytest.raises(UsageError, match="once"):
        load_recipe("digits", ["seed=1", "seed=2"])


def test_paths_are_cleared_by_overrides(tmp_path):
    source = {**PLAIN, "weights": "w.pt", "data": "d", "model": "m.py:f", "prune": {"sensitivity": "s"}}
    for nothing in ("null", ""):
        cleared = load_recipe(source, [f"{k}={nothing}" for k in ("weights", "data", "model", "prune.sensitivity")])
        assert (cleared.weights, cleared.data, cleared.model, cleared.prune.sensitivity) == (None, None, None, None)
    with pytest.raises(UsageError, match="task must be a text"):
        load_recipe(source, ["task="])
    assert load_recipe(source, ["name=null"]).name == "null"  # a text, not a path


def test_a_home_that_is_nobodys_is_refused():
    for key, value in (("weights", "~nobody-here/x.pt"), ("model", "~nobody-here/x.py:f")):
        with pytest.raises(UsageError, match="~nobody-here"):
            load_recipe({**PLAIN, key: value})
        with pytest.raises(UsageError, match="~nobody-here"):
            load_recipe(PLAIN, [f"{key}={value}"])


def test_colons_are_no_numbers_to_base_60(tmp_path):
    recipe = load_recipe(PLAIN, ["prune.granularity=2:4", "prune.levels=[{granularity: 1:4}]"])
    assert (recipe.prune.granularity, recipe.prune.levels[0].granularity) == ("2:4", "1:4")
    (tmp_path / "r.yaml").write_text("schema: 1\ntask: digits\nname: 1:30.5\nprune: {granularity: 2:4}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.name, recipe.prune.granularity) == ("1:30.5", "2:4")
    assert load_recipe(read_yaml(recipe.to_yaml())).digest == recipe.digest


def test_the_source_mapping_is_not_changed():
    source = {**PLAIN, "prune": {"levels": ({"macs": 0.5},)}}
    before = json.dumps(source)
    load_recipe(source, ["prune.levels.0.macs=0.25", "data=x"])
    assert json.dumps(source) == before


def test_the_schema_validates_nothing_that_the_model_refuses():
    assert recipe_schema()["additionalProperties"] is False
    assert set(recipe_schema()["required"]) == {"schema", "task"}
    assert isinstance(parse_recipe(PLAIN), Recipe)


def test_layers_that_teach_need_a_teacher_and_their_default_is_no_other_recipe():
    plain = parse_recipe(PLAIN)
    asked = parse_recipe({**PLAIN, "recover": {"distil_layers": ["stage?"]}})
    assert "distil_layers" not in plain.to_yaml()  # runs that are begun go on
    assert plain.digest != asked.digest
    assert load_recipe(read_yaml(asked.to_yaml())).digest == asked.digest
    with pytest.raises(UsageError, match="distil_layers must come with distil kl or mse"):
        parse_recipe({**PLAIN, "recover": {"distil_layers": ["stage?"], "distil": "none"}})


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"prune": {"levels": [{"macs": 0.5}], "regularize": "growing"}},
        {"prune": {"levels": [{"parameters": 0.5, "factorize": "svd"}]}},
        {"prune": {"levels": [{"density": 0.5}], "granularity": "element", "criterion": "snip"}},
        {
            "prune": {
                "levels": [{"density": 0.5}],
                "granularity": "element",
                "criterion": "wanda",
                "schedule": "gradual",
            }
        },
        {"prune": {"levels": [{}], "granularity": "2:4", "criterion": "sr_ste"}},
        {"budget": {"density": 0.5}},
        {"curve": {"amounts": [0.5], "schedules": ["iterative", "from-scratch"]}},
    ],
)
def test_no_allocation_is_uniform_as_it_was_where_the_library_takes_that(asked):
    silent = parse_recipe({**PLAIN, **asked})
    prune = {**asked.get("prune", {}), "allocation": "uniform"}
    said = parse_recipe({**PLAIN, **asked, "prune": prune})
    assert silent.prune.allocation is None
    assert (silent.digest, silent.to_yaml()) == (said.digest, said.to_yaml())
    assert "regularize_options" not in silent.to_yaml() and "energy" not in silent.to_yaml()


@pytest.mark.parametrize(
    "asked",
    [
        {"prune": {"levels": [{"density": 0.5}], "granularity": "element", "schedule": "gradual"}},
        {"prune": {"levels": [{"density": 0.5}], "granularity": "element", "criterion": "movement"}},
        {"prune": {"levels": [{"density": 0.5}], "granularity": "element", "schedule_options": {"rounds": 100}}},
        {"prune": {"schedule": "rigl"}, "budget": {"density": 0.5}},
        {"prune": {"granularity": "element"}, "curve": {"amounts": [0.5], "schedules": ["one-shot", "gradual"]}},
        {"curve": {"amounts": [0.5], "methods": [{"criterion": "movement", "granularity": "element"}]}},
    ],
)
def test_no_allocation_stays_unsaid_where_the_library_takes_another(asked):
    silent = parse_recipe({**PLAIN, **asked})
    prune = {**asked.get("prune", {}), "allocation": "uniform"}
    assert "allocation: uniform" not in silent.to_yaml()
    assert silent.digest != parse_recipe({**PLAIN, **asked, "prune": prune}).digest
    again = load_recipe(read_yaml(silent.to_yaml()))
    assert again.digest == silent.digest and again.prune.allocation is None


@pytest.mark.parametrize(
    ("level", "says"),
    [
        (
            {"energy": 0.9},
            "energy must stand alone in a level with factorize, whose ranks it decides. Got no factorize",
        ),
        ({"energy": 0.9, "factorize": "svd", "macs": 0.5}, "Got it with macs"),
        ({"energy": 1.5, "factorize": "svd"}, "energy must be less than 1"),
        ({"factorize": "svd"}, "level 1 must give channels, parameters or macs"),
    ],
)
def test_energy_says_ranks_and_nothing_else(level, says):
    assert (
        parse_recipe({**PLAIN, "prune": {"levels": [{"energy": 0.9, "factorize": "asvd"}]}}).prune.levels[0].energy
        == 0.9
    )
    with pytest.raises(UsageError, match=says):
        parse_recipe({**PLAIN, "prune": {"levels": [level]}})
