"""What `sfumato distill` says to those who ask for what it has not."""

import pytest

from sfumato.cli import main


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["lmc"], ["no such recipe or file", "lcm"]),
        (["quickstart"], ["makes no student", "sfumato train quickstart"]),
        (["quickstart", "teacher=runs/nothing"], ["nothing to learn from a teacher", "latent_consistency"]),
        (["lcm", "teacher=runs/nothing"], ["no model to start from", "teacher", "runs/nothing"]),
        (["lcm", "student=runs/nothing"], ["no model to start from", "start", "runs/nothing"]),
        (["lcm", "teacher=null"], ["teacher is needed by the objective latent_consistency"]),
        (["lcm", "teacher_guidance=foo"], ["teacher_guidance is not known", "foo"]),
    ],
)
def test_what_cannot_be_taught_is_told(
    asked: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(SystemExit) as left:
        main(["distill", *asked])
    talk = capsys.readouterr().err
    assert left.value.code and all(word in talk for word in said), talk
