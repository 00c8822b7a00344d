"""A killed run continues to the same bytes: model, plan, export; records equal but for their timings."""

import json
import signal
from pathlib import Path

import pytest

import forked
from paredown.pipeline.folder import RunFolder

pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

TASK = Path(__file__).with_name("small_task.py")
RECIPE = f"""
schema: 1
name: small
task: {TASK}
threads: 1
prune:
  align: 4
  levels:
    - channels: 0.75
    - channels: 0.667
recover: {{epochs: 2, lr: 0.02, batch_norm_batches: 4}}
measure: {{runs: 5, seconds: 0.2}}
"""
SAME = ("model.safetensors", "plan.json", "int8.onnx", "dense.onnx", "level-1.onnx", "level-2.onnx", "recipe.yaml")


def run(out: Path, kill_at: int = 0) -> int:
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    code = "import sys; from paredown.pipeline import compress; compress(sys.argv[1], out=sys.argv[2], quiet=True)"
    done = forked.run(code, recipe, out, env={"KILL_AT": str(kill_at)})
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.wait()


def untimed(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for value in record["measured"].values():
            if value["timing"]:
                value.clear()
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out) == 0
    return out


def compare(whole: Path, out: Path) -> None:
    for name in SAME:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert untimed(out / "records.jsonl") == untimed(whole / "records.jsonl")
    assert (out / "report.html").stat().st_size > 5_000
    assert not list(out.rglob("*.tmp"))


def test_the_run_did_its_job(whole: Path) -> None:
    records = {r["cell"]["stage"]: r for r in untimed(whole / "records.jsonl")}
    assert list(records) == ["examine", "dense", "level-1", "level-2", "int8", "insight", "verdict"]
    assert (
        records["int8"]["measured"]["parameters"]["value"] < 0.6 * records["dense"]["measured"]["parameters"]["value"]
    )
    assert records["int8"]["details"]["float_nodes"] == []
    share = records["int8"]["details"]["layers_on_codes"]
    assert share["on_codes"] == share["of"] > 0
    assert len(records["examine"]["details"]["network"]) == 64  # by which a curve and a sensitivity know it
    assert records["level-2"]["details"]["proof"]["moved"] > 0
    assert (whole / "int8.onnx").stat().st_size == records["int8"]["measured"]["bytes"]["value"]


def test_the_dense_file_is_known_by_its_times_in_turns(whole: Path, tmp_path: Path) -> None:
    """By itself it has the caches for itself: that is no measure of what disturbs it in turns."""
    records = [json.loads(line)["measured"] for line in (whole / "records.jsonl").read_text().splitlines()]
    in_turns = [r["baseline_latency_ms"]["value"] for r in records if "baseline_latency_ms" in r]
    assert len(in_turns) == 3  # two levels and their codes
    assert RunFolder(path=whole).least_dense_ms() == min(in_turns)
    assert RunFolder(path=tmp_path).least_dense_ms() is None


@pytest.mark.slow
def test_two_runs_are_equal(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run") == 0
    compare(whole, tmp_path / "run")


@pytest.mark.parametrize("first", [9, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_and_continued_twice(whole: Path, tmp_path: Path, first: int) -> None:
    """Killed in the first attempt, killed later in the second, finished in the third."""
    out = tmp_path / "run"
    assert run(out, kill_at=first) == -signal.SIGKILL
    assert not (out / "report.html").exists()
    run(out, kill_at=first + 13)
    assert run(out) == 0
    compare(whole, out)


@pytest.mark.slow
def test_killed_at_twenty_points(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kills = 0
    for at in range(
        3, 43, 2
    ):  # later each time: what is done is not done again, so a fixed point would be the same one
        kills += run(out, kill_at=at) != 0
    assert kills >= 10
    assert run(out) == 0
    compare(whole, out)


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(whole: Path) -> None:
    before = (whole / "records.jsonl").read_bytes()
    assert run(whole) == 0
    assert (whole / "records.jsonl").read_bytes() == before, "timings too: nothing was measured again"


def test_another_recipe_is_refused_with_the_difference(whole: Path) -> None:
    from paredown.errors import UsageError
    from paredown.pipeline import compress

    recipe = whole.parent / "recipe.yaml"
    with pytest.raises(UsageError, match=r"(?s)holds another run.*seed"):
        compress(str(recipe), out=whole, overrides=["seed=7"], quiet=True)
    assert (whole / "report.html").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    from paredown.errors import UsageError
    from paredown.pipeline import compress

    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(UsageError, match="other files"):
        compress(str(recipe), out=out, quiet=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_run_that_was_refused_before_any_work_stands_in_nobodys_way(tmp_path: Path) -> None:
    """Its task was wrong: mended, the same command begins. What has made a stage, a checkpoint or a file is kept."""
    from paredown.errors import UsageError
    from paredown.pipeline.folder import opened

    def take(recipe: str) -> None:
        with opened(tmp_path, recipe, lambda there: "" if there == recipe else "differs", overwrite=False):
            pass

    take("first")
    take("second")
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "second"
    for made in ("steps/level-1.safetensors", "steps/00-examine.json", "dense.onnx", "records.jsonl", "trials"):
        (tmp_path / made).touch()
        with pytest.raises(UsageError, match="holds another run"):
            take("third")
        (tmp_path / made).unlink()
    take("third")


@pytest.mark.parametrize(
    ("there", "holds", "others"),
    [
        ("trials/0a", "a curve", ("a run", "a sensitivity")),
        ("journal.jsonl", "a sensitivity", ("a run", "a curve")),
        ("steps/00-examine.json", "a run", ("a curve", "a sensitivity")),
    ],
)
def test_a_folder_of_another_command_is_refused_and_stays_as_it_is(
    there: str, holds: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    from paredown.errors import UsageError
    from paredown.pipeline.folder import opened

    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    (tmp_path / "recipe.yaml").write_text("the same")
    for kind in others:
        for overwrite in (False, True):
            with (
                pytest.raises(
                    UsageError, match=f"out must be an empty folder or one of {kind}. .* which holds {holds}"
                ),
                opened(tmp_path, "the same", lambda _: "", overwrite=overwrite, kind=kind),
            ):
                pass
    with opened(tmp_path, "the same", lambda _: "", overwrite=False, kind=holds):
        assert (tmp_path / there).read_text() == "mine"


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    from paredown.errors import ResourceError
    from paredown.pipeline.folder import opened

    with (
        opened(tmp_path, "seed: 0\n", lambda there: "", overwrite=False),
        pytest.raises(ResourceError, match="one owner"),
        opened(tmp_path, "seed: 0\n", lambda there: "", overwrite=False),
    ):
        pytest.fail("both got in")
