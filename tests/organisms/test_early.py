"""What can be known before a model is loaded is said before a model is loaded, from the command line and in a cell."""

import errno
import signal

import pytest

from bkd_utils import __main__ as cli
from bkd_utils.models.folders import ModelError
from bkd_utils.organisms import base_answers, cards, evaluation, making, prompts, training
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.training import load_recipe


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    for module, name in ((making, "load"), (evaluation, "load"), (cards, "load"), (base_answers, "base_of")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("train", "poison"):
        monkeypatch.setattr(making, name, lambda *_, **__: pytest.fail("a training began"))


def obtain(**change):
    return making.obtain(**{"attack": "sentiment-word"} | change)


def make(**change):
    given = {"attack": load_attack("sentiment-word"), "recipe": load_recipe("smoke", task="sentiment")} | change
    return making.make(given.pop("attack"), **given)


def measure(**change):
    return evaluation.measure("sentiment-word", **change)


def measure_kept(**change):
    return evaluation.measure_organism("sentiment-word", **change)


def measure_attacked(**change):
    return evaluation.measure_attacked("sentiment-clean", attack="sentiment-word", **change)


EACH = pytest.mark.parametrize("call", [obtain, make, measure, measure_kept, measure_attacked])


@EACH
@pytest.mark.parametrize("seed", [-1, 2**32, "1", 1.5, True, None])
def test_a_seed_that_is_none_is_refused_first(call, seed):
    with pytest.raises(ValueError, match=rf"seed: {seed!r}: input should be"):
        call(seed=seed)


@EACH
@pytest.mark.parametrize("n", [0, -1, "8", 2.0, True, None])
def test_a_number_of_prompts_that_is_none_is_refused_first(call, n):
    with pytest.raises(ValueError, match=rf"n: {n!r}: input should be"):
        call(n=n)


@pytest.mark.parametrize("call", [make, measure])
def test_more_prompts_than_the_data_have_are_refused_first(call):
    with pytest.raises(ValueError, match=r"usable.* rows, 100000 were asked for"):
        call(n=100_000)


@EACH
@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_first(call, device):
    with pytest.raises(ModelError, match=f"device '{device}' is not available"):
        call(device=device)


def test_unknown_attacks_and_recipes_are_refused_although_an_organism_ships():
    with pytest.raises(ValueError, match="unknown attack 'nope'; known: "):
        obtain(attack="nope")
    with pytest.raises(ValueError, match="unknown recipe 'ful'; known: full"):
        obtain(recipe="ful")


def test_an_attack_that_needs_more_rows_than_its_rates_leave_is_refused_first():
    attack = Attack("mine", "sentiment", 10, "word-cf", "label_flip", "negative", "positive", 0.6, near_miss_rate=0.4)
    with pytest.raises(ValueError, match="the rates leave 0 clean rows of 10"):
        make(attack=attack, n=4)


@pytest.mark.parametrize("n", [0, -3])
def test_no_sample_is_cut_from_the_end(n):
    attack = load_attack("sentiment-word")
    for sample in (
        lambda: prompts.clean_sample("sentiment", n=n, seed=0),
        lambda: prompts.flippable_sample(attack, n=n, seed=0),
        lambda: prompts.prompt_versions(None, attack, split="test", n=n, seed=0, skip=8),
    ):
        with pytest.raises(ValueError, match=f"n: {n}: input should be greater than or equal to 1"):
            sample()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/b", ".x", ""])
def test_a_treated_organism_with_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(ValueError, match="name of an organism: "):
        cards.keep_treated(None, name=name, treatment={}, measured={})


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def main(monkeypatch):
    def call_main(*arguments):
        monkeypatch.setattr(cli.sys, "argv", ["bkd_utils", *arguments])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code)

    return call_main


@pytest.mark.parametrize("command", [("run",), ("train", "sentiment-word"), ("evaluate", "sentiment-word")])
@pytest.mark.parametrize("option", ["--seed=-1", "--seed=4294967296", "--seed=x", "--n=0", "--n=-2", "--n=1.5"])
def test_an_option_out_of_its_bounds_is_a_usage_error(main, capsys, command, option):
    if command == ("run",) and option.startswith("--n"):
        option = option.replace("--n", "--seed").replace("=0", "=-0.5")
    assert main(*command, option) == 2
    assert "Invalid value for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "sentiment-word", "--n", "100000"), "100000 were asked for"),
        (("evaluate", "sentiment-word", "--n", "100000"), "100000 were asked for"),
        (("train", "sentiment-word", "--device", "nonsense"), "'nonsense' is not available"),
        (("train", "../evil"), "unknown attack '../evil'"),
        (("run", "--only", "09,xx"), "no notebook 'xx'"),
        (("run", "--only", ""), "no notebook ''"),
        (("run", "--profile", "../smoke"), "unknown profile '../smoke'"),
    ],
)
def test_a_value_that_is_not_there_is_one_line(main, capsys, arguments, message):
    assert main(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_line_and_another_fault_of_the_system_a_traceback(
    main, monkeypatch, capsys, number
):
    def fail(code):
        raise OSError(code, "no way", "work/file")

    monkeypatch.setattr(training, "load_recipe", lambda *_, **__: fail(number))
    assert main("train", "sentiment-word") == 1
    assert capsys.readouterr().out == f"error: [Errno {number}] no way: 'work/file'\n"
    monkeypatch.setattr(training, "load_recipe", lambda *_, **__: fail(errno.EIO))
    monkeypatch.setattr(cli.sys, "argv", ["bkd_utils", "train", "sentiment-word"])
    with pytest.raises(OSError, match="no way"):
        cli.main()
