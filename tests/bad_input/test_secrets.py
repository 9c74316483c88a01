"""Keys and passwords of the environment reach no file and no line that a run writes."""

import logging
import os
import pathlib
import subprocess
import sys

import pytest
from bad_inputs import bad

from launcher import logs
from launcher.cli.report import exit_status_of
from launcher.errors import ConfigError
from launcher.secrets import check_no_literal, check_no_secret, is_secret_name, redacted

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)


BROUGHT_IN = (
    "WANDB_API_KEY ... leave it out; what needs WANDB_API_KEY reads it from the environment"
)
CASES = [
    bad("logger.project=${oc.env:WANDB_API_KEY}", says=f"logger.project holds ... {BROUGHT_IN}"),
    bad("logger.tags=[a,'${oc.env:WANDB_API_KEY}']", says=f"logger.tags[1] holds ... {BROUGHT_IN}"),
    bad(f"logger.entity={KEY}", says=f"logger.entity holds ... {BROUGHT_IN}"),
    bad(f"hydra.run.dir=runs/{KEY}", says=f"hydra.run.dir holds ... {BROUGHT_IN}"),
    bad("hydra.run.dir=runs/${oc.env:WANDB_API_KEY}", says=f"hydra.run.dir holds ... {BROUGHT_IN}"),
    bad("+model.args={key: '${oc.env:WANDB_API_KEY}'}", "model=custom", "model.target=a:b",
        says=f"model.args.key holds ... {BROUGHT_IN}"),
    bad("train.steps=${oc.env:WANDB_API_KEY}", says="'<WANDB_API_KEY>' ... or write the value"),
    bad(f"mode={KEY}x", says=f"mode holds ... {BROUGHT_IN}"),
    bad("+hydra.job.env_set.WANDB_API_KEY=x", says="hydra.job.env_set.WANDB_API_KEY would write a "
        "secret ... set WANDB_API_KEY in the environment"),
]  # fmt: skip


LITERAL = (
    "looks like a key or a password ... leave it out, and read it from an environment variable"
)
OWN = ("model=custom", "model.target=a:b")
LITERALS = {
    "{api_key: abcd1234}": "model.args.api_key",
    "{db: {password: 'correct horse'}}": "model.args.db.password",
    "{tokens: [a, sk-abcdefghijklmnopqrstuvwx]}": "model.args.tokens[1]",
    "{hub_token: f00ba4f00ba4f00ba4}": "model.args.hub_token",
    "{note: 'use hf_abcdefghijklmnopqrstuvwx here'}": "model.args.note",
    "{aws: AKIAABCDEFGHIJKLMNOP}": "model.args.aws",
    "{pem: '-----BEGIN RSA PRIVATE KEY-----'}": "model.args.pem",
}


@pytest.mark.parametrize("arguments", LITERALS)
def test_a_secret_that_stands_in_the_config_is_refused_and_not_shown(arguments, refuse, capsys):
    refuse(bad(*OWN, f"+model.args={arguments}", says=f"{LITERALS[arguments]} {LITERAL}"))
    shown = "".join(capsys.readouterr())
    assert not [
        word for word in ("abcd1234", "horse", "sk-", "f00", "hf_", "AKIA") if word in shown
    ]


HARMLESS = {
    "label_key": "input_ids", "eos_token": "<|endoftext|>", "pad_token": "[PAD0123456789AB]",
    "max_token": 512, "primary_key": "id", "password": "", "tokenizer": "gpt2-medium-2019-11-05",
}  # fmt: skip


def test_what_only_has_such_a_name_is_let_through():
    check_no_literal("model.args", HARMLESS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_secret_in_the_config_is_refused_and_not_shown(case, refuse, capsys):
    refuse(case)
    assert KEY not in "".join(capsys.readouterr())


def test_no_file_of_a_run_holds_the_key(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    small = ("model.hidden=16", "model.layers=2", "parallel=single", "train.steps=1")
    arguments = (*small, "train.eval_batches=0", "train.global_batch=2", "hydra.run.dir=run")
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "plan.json", "launcher.log", "summary.json"} <= {p.name for p in written}
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in done.stdout + done.stderr


def test_logs_show_the_name_in_place_of_the_secret(tmp_path, capsys):
    with logs.logging_to(tmp_path / "launcher.log"):
        try:
            raise ValueError(f"no login with {KEY}")
        except ValueError:
            logging.getLogger("launcher.test").exception("could not use %s", KEY)
        logging.getLogger("launcher.test").warning("could not use %s", KEY)
    text = (tmp_path / "launcher.log").read_text()
    assert "could not use <WANDB_API_KEY>" in text
    assert "ValueError: no login with <WANDB_API_KEY>" in text
    assert "could not use <WANDB_API_KEY>" in capsys.readouterr().out
    assert KEY not in text


@pytest.mark.parametrize("error", [ConfigError, RuntimeError])
def test_tracebacks_show_the_name_in_place_of_the_secret(error, capsys):
    def fail():
        raise error(f"no login with {KEY}")

    assert exit_status_of(fail, debug=True) in (1, 2)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert f"{error.__name__}: no login with <WANDB_API_KEY>" in shown
    assert KEY not in shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WANDB_API_KEY", True), ("HF_TOKEN", True), ("token", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("db-password", True), ("TOKENIZERS_PARALLELISM", False), ("KEYBOARD", False), ("PATH", False),
    ],
)  # fmt: skip
def test_names_of_secrets_end_like_one(name, expected):
    assert is_secret_name(name) == expected


def test_short_values_are_no_secrets(monkeypatch):
    monkeypatch.setenv("SSH_KEY", "yes")
    assert redacted("yes or no") == "yes or no"
    check_no_secret("x", {"y": ["yes", 3, None]})


def test_of_two_secrets_the_longer_is_replaced_first(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", KEY[:12])
    assert redacted(f"{KEY} {KEY[:12]}") == "<WANDB_API_KEY> <SHORT_TOKEN>"
