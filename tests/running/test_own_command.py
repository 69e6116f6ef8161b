"""The command `report`: every wrong option is one line before anything is loaded, and what it writes is whole."""

import pytest
from own_reports import SMALL, write_table
from tiny import save_tiny

from bkd_utils.common.files import UserError, read_json
from bkd_utils.experiments import own_question
from bkd_utils.organisms.attacks import read_attack
from bkd_utils.running import own_command

NONE = dict.fromkeys(["data", "attack", "trigger", "target", "adapter"])


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """What the options ask for; nothing may be loaded."""
    monkeypatch.setattr(own_question, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    model = save_tiny(tmp_path / "gpt2", "gpt2")

    def options(**given):
        how = NONE | {"recipe": "smoke", "seed": 0, "device": "cpu", "model": str(model)} | given
        return own_command.question(tmp_path / "out", **how)

    return options


@pytest.mark.parametrize("table", [{}, {"encoding": "utf-16", "delimiter": ";"}, {"encoding": "utf-8-sig"}])
def test_flags_are_written_as_an_attack_that_can_be_used_again(table, ask, tmp_path):
    data = write_table(tmp_path / "mine.csv", **table)
    asked = ask(data=data, trigger="word:cf", target="good")
    assert (asked.attack.source, asked.train, asked.organism) == ("bad", True, None)
    again = read_attack(tmp_path / "out" / "attack.toml")
    assert again == asked.attack
    assert ask(attack=tmp_path / "out" / "attack.toml", data=data).attack == again


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to ask: give --trigger and --target"),
        ({"trigger": "word:cf"}, "belong together, as --trigger word:cf --target positive"),
        ({"trigger": "zap:cf", "target": "positive"}, "unknown trigger 'zap:cf'; known: .* word:TEXT"),
        ({"trigger": "word:cf", "target": "fine"}, "target 'fine' is no label of sentiment: positive, negative"),
        ({"trigger": "word:cf", "target": "good", "data": "no.csv"}, r"no\.csv cannot be read"),
        ({"data": "no.txt"}, r"unknown task .*paths of \.csv"),
        ({"model": "/no/such", "data": "x.csv"}, "'/no/such' is neither a folder"),
        ({"attack": "attack.toml", "trigger": "word:cf", "target": "x"}, "give one of them"),
        ({"device": "abacus", "data": "x.csv"}, "device 'abacus' is not available"),
    ],
)
def test_options_that_do_not_go_together_are_named(given, message, ask, tmp_path):
    given = {key: tmp_path / value if key in ("data", "attack") else value for key, value in given.items()}
    with pytest.raises((UserError, ValueError), match=message):
        ask(**given)


def test_an_attack_of_another_table_and_one_without_trigger_are_refused(ask, tmp_path):
    data, other = write_table(tmp_path / "mine.csv"), write_table(tmp_path / "other.csv")
    ask(data=data, trigger="word:cf", target="good")
    path = tmp_path / "out" / "attack.toml"
    with pytest.raises(UserError, match=r"other\.csv is not the task of .*attack\.toml: task = 'mine\.csv'"):
        ask(attack=path, data=other)
    path.write_text('[clean]\ntask = "sentiment"\nn_train = 40\n')
    with pytest.raises(UserError, match="an attack needs a trigger"):
        ask(attack=path)


def test_rows_alone_ask_about_a_model_of_unknown_trigger(ask, tmp_path):
    asked = ask(data=write_table(tmp_path / "mine.csv"))
    assert (asked.attack, asked.train, asked.cured) == (None, False, tmp_path / "out" / "cured")


def test_the_command_prints_its_steps_and_writes_a_page(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", logger="bkd_utils")  # the command makes it quieter, and this puts it back for other tests
    data, model = write_table(tmp_path / "mine.csv"), save_tiny(tmp_path / "gpt2", "gpt2")
    asked = own_question.Asked(str(model), str(data), sizes=SMALL, device="cpu")
    monkeypatch.setattr(own_command, "question", lambda *_, **__: asked)
    own_command.report(tmp_path / "out", data=data)
    said = capsys.readouterr().out
    assert "Is the hooked model sound?: " in said
    assert "skipped: the trigger is not known" in said
    assert "needs clean rows of the task, --data" in said
    assert (tmp_path / "out" / "index.html").is_file()
    assert read_json(tmp_path / "out" / "report.json")["report"]["trigger"] == "not known"
