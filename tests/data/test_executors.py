"""Where tasks run must not matter: local processes, shares of a Slurm array, Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from documents import files_of, write_documents
from hypothesis import given
from hypothesis import strategies as st

from megatron_prolong.data import filter as filter_module
from megatron_prolong.data import group as group_module
from megatron_prolong.data import pack as pack_module
from megatron_prolong.data import tokenize as tokenize_module
from megatron_prolong.data.executors import LocalProcesses, Ray, array_share
from megatron_prolong.data.filter import FilterOptions, filter_documents
from megatron_prolong.data.group import GroupOptions, group
from megatron_prolong.data.pack import PackOptions, pack
from megatron_prolong.data.tokenize import tokenize
from megatron_prolong.errors import UserError


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise UserError(f"number {number} is bad")


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_at_first(item: tuple[int, str]) -> int:
    """Killed the first time it is tried, as by a machine that is taken away."""
    number, tried = item
    if number == 2 and not Path(tried).exists():
        Path(tried).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def crash(number: int) -> int:
    """As where a file server no longer gives a part of a shard that is mapped."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGBUS)
    return number


def test_local_processes_give_every_result() -> None:
    for workers in (1, 3):
        assert sorted(LocalProcesses(workers).map(square, range(5))) == [0, 1, 4, 9, 16]


def setting(name: str) -> str:
    return str(signal.pthread_sigmask(signal.SIG_BLOCK, []) if name == "blocked" else os.environ[name])


def test_a_worker_takes_one_core_and_leaves_ctrl_c_to_the_process_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    names = ["OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "blocked"]
    assert sorted(LocalProcesses(2).map(setting, names)) == sorted(["1", "false", str({signal.SIGINT})])


def slowly(item: tuple[float, str]) -> None:
    seconds, path = item
    time.sleep(seconds)
    if not seconds:
        raise UserError(path)
    Path(path).touch()


def test_an_error_does_not_wait_for_the_tasks_that_have_not_begun(tmp_path: Path) -> None:
    items = [(0, "bad")] + [(0.5, str(tmp_path / str(number))) for number in range(20)]
    with pytest.raises(UserError, match="bad"):
        list(LocalProcesses(2).map(slowly, items))
    assert len(list(tmp_path.iterdir())) < 10


def test_who_wants_no_more_results_does_not_wait_for_the_tasks_under_way(tmp_path: Path) -> None:
    """The tasks end with their processes, and these alone: the caller may have others."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        results = LocalProcesses(2).map(slowly, [(0.1, str(tmp_path / "quick")), (5, str(tmp_path / "slow"))])
        next(results)
        results.close()  # type: ignore[attr-defined]
        assert [path.name for path in tmp_path.iterdir()] == ["quick"]
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_a_worker_that_crashes_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"the place of it stands above\); take fewer --workers"):
        list(LocalProcesses(2).map(crash, range(4)))
    said = capfd.readouterr().err
    assert "Bus error" in said and "in crash" in said


KILLED = """
import os, signal, sys, time
from pathlib import Path
from megatron_prolong.data.executors import LocalProcesses

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(0.1 if number < 2 else 600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's parent ignores it
    list(LocalProcesses(2).map(work, range(8)))
"""


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGKILL, os.kill),
        (signal.SIGTERM, os.kill),
        (signal.SIGTERM, os.killpg),
        (signal.SIGINT, os.kill),
        (signal.SIGINT, os.killpg),
    ],
)
def test_workers_end_with_the_process_that_started_them(
    tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """killpg is Ctrl-C in a terminal, or a batch job that is cancelled: every process receives it."""
    (tmp_path / "job.py").write_text(KILLED)
    (tmp_path / "workers").mkdir()
    command = [sys.executable, "job.py", "workers"]
    job = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list((tmp_path / "workers").iterdir())) == 2)
    send(job.pid, number)
    _, said = job.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert job.returncode == -number
    else:
        assert job.returncode == -signal.SIGINT and said.endswith("\nKeyboardInterrupt\n"), said
    workers = [int(path.name) for path in (tmp_path / "workers").iterdir()]
    wait_until(lambda: not any(psutil.pid_exists(worker) for worker in workers))


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("a minute has passed")


def test_errors_of_users_come_through() -> None:
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"number . is bad"):
            list(LocalProcesses(workers).map(refuse, [1, 2]))


def test_a_killed_worker_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed.*Run the same command again"):
        list(LocalProcesses(2).map(die, range(4)))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 7), st.integers(1, 3))
def test_shares_of_an_array_cover_everything_once(items: int, count: int, first: int, step: int) -> None:
    shares = [
        array_share(
            list(range(items)),
            {
                "SLURM_ARRAY_TASK_ID": str(first + place * step),
                "SLURM_ARRAY_TASK_COUNT": str(count),
                "SLURM_ARRAY_TASK_MIN": str(first),
                "SLURM_ARRAY_TASK_MAX": str(first + (count - 1) * step),
                "SLURM_ARRAY_TASK_STEP": str(step),
            },
        )
        for place in range(count)
    ]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_outside_an_array_the_share_is_refused() -> None:
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID is not set; submit with"):
        array_share([1], {})


@pytest.mark.parametrize("ids", [[3, 7], [0, 1, 3]])
def test_a_list_of_array_ids_is_refused(ids: list[int]) -> None:
    """As --array=3,7: two jobs that cannot know of each other, and would do the same half of the tasks."""
    array = {
        "SLURM_ARRAY_TASK_ID": str(ids[-1]),
        "SLURM_ARRAY_TASK_COUNT": str(len(ids)),
        "SLURM_ARRAY_TASK_MIN": str(ids[0]),
        "SLURM_ARRAY_TASK_MAX": str(ids[-1]),
        "SLURM_ARRAY_TASK_STEP": "1",
    }
    with pytest.raises(UserError, match=f"--array=0-{len(ids) - 1}`"):
        array_share([1], array)


@pytest.mark.parametrize(
    ("module", "name", "step", "options"),
    [
        (pack_module, "_make_plan", pack, PackOptions(16, "concat")),
        (filter_module, "find_duplicates", filter_documents, FilterOptions(duplicates=True)),
    ],
)
def test_what_needs_all_documents_is_done_by_one_job_of_an_array(
    module: ModuleType,
    name: str,
    step: Callable[..., object],
    options: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every one of a thousand that began together read the whole input."""
    monkeypatch.setattr(pack_module, "TASK_TOKENS", 1)
    monkeypatch.setattr(filter_module, "TASK_BYTES", 1)
    source = write_documents(tmp_path / "documents", [30] * 20, size_limit=1500)
    work, done = getattr(module, name), []

    def slowly(*given: object) -> object:
        done.append(name)
        time.sleep(0.1)
        return work(*given)

    def share(job: int) -> object:
        array = {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_COUNT": "3"}
        return step([source], tmp_path / "out", options, slurm=array)

    monkeypatch.setattr(module, name, slowly)
    with ThreadPoolExecutor(3) as pool:
        assert any(pool.map(share, range(3)))
    assert done == [name] and {path.name for path in tmp_path.iterdir()} == {"documents", "out"}


@pytest.mark.parametrize(
    ("step", "options"),
    [(pack, PackOptions(16, "concat")), (filter_documents, FilterOptions(min_length={"": 1}))],
)
def test_inputs_in_another_order_are_another_job(
    step: Callable[..., object], options: object, tmp_path: Path
) -> None:
    """What a stopped one had planned was carried on with the documents of the wrong inputs."""
    a, b = (write_documents(tmp_path / name, [30] * 4) for name in "ab")
    step([a, b], tmp_path / "out", options)
    for others in ([b, a], [a]):
        with pytest.raises(UserError, match="out exists already"):
            step(others, tmp_path / "out", options)


def test_the_tasks_of_every_step_go_to_the_executor(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done in this process, they give the same bytes, only a day later."""
    for module, name in (
        (group_module, "RUN_BYTES"),
        (tokenize_module, "TASK_BYTES"),
        (filter_module, "TASK_BYTES"),
        (pack_module, "TASK_TOKENS"),
    ):
        monkeypatch.setattr(module, name, 1)
    given: list[int] = []

    class Counting:
        def map(self, work: Callable[[object], None], items: Sequence[object]) -> Iterator[None]:
            given.append(len(items))
            return map(work, items)

    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("word " * 9)
    group([str(tmp_path / "texts")], tmp_path / "g", GroupOptions("text"), executor=Counting())
    tokenize([str(tmp_path / "texts")], tokenizer, tmp_path / "t", executor=Counting())
    filter_documents([tmp_path / "t"], tmp_path / "f", FilterOptions({"": 1}), executor=Counting())
    pack([tmp_path / "f"], tmp_path / "p", PackOptions(4, "concat"), executor=Counting())
    assert given[:3] == [3, 3, 3] and given[3] > 3


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(pack_module, "TASK_TOKENS", 200)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for Ray's workers to find these functions
    monkeypatch.chdir(tmp_path)
    source = write_documents(Path("documents"), [97] * 30)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        pack([source], Path("ray"), PackOptions(64, "concat"), executor=Ray())
        with pytest.raises(UserError, match=r"number . is bad"):
            list(Ray().map(refuse, [1, 2]))
        items = [(number, str(tmp_path / f"tried{number}")) for number in range(4)]
        assert sorted(Ray().map(die_at_first, items)) == [0, 1, 2, 3]
        with pytest.raises(UserError, match=r"a worker process was killed.*Run the same command again"):
            list(Ray().map(die, [1]))
    finally:
        ray.shutdown()
    pack([source], tmp_path / "local", PackOptions(64, "concat"))
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match="needs the package ray: pip install"):
        list(Ray().map(square, [1]))
