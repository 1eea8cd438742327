"""The short trainings of the notebooks: what is given to them is what they use."""

import sys
from functools import partial

import pytest
import torch

import sim_core as sim
from toy import classroom, logbook
from toy.config import Config, resolve
from toy.marking import Wrong
from toy.mixtures import make_target
from toy.train_2d import make_denoiser

RING = make_target("ring")
SHORT = dict(steps=3, warmup=2, width=8, batch=16)


@pytest.fixture(autouse=True)
def short_looks(monkeypatch):
    monkeypatch.setattr(logbook, "N_LOG", 256)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return make_denoiser(resolve(Config(width=8)), RING).requires_grad_(False)


def test_a_student_without_changes_is_the_loop_of_train_2d(teacher):
    run, again = (classroom.student(RING, teacher, **SHORT) for _ in range(2))
    same_loss = classroom.student(RING, teacher, partial(sim.sim_loss, distance="pseudo_huber"), **SHORT)
    same_levels = classroom.student(RING, teacher, sigma_mean=-1.2, sigma_std=1.2, **SHORT)
    for other in (again, same_loss, same_levels):
        assert torch.equal(run.samples, other.samples) and other.step == 3
    assert run.samples.shape == (2000, 2) and "of 8" in classroom.verdict(run)


def test_a_students_loss_and_levels_are_those_given(teacher):
    usual = classroom.student(RING, teacher, **SHORT).samples
    flipped = classroom.student(
        RING, teacher, lambda *triple: -sim.sim_loss(*triple, "pseudo_huber"), **SHORT
    )
    at_low = classroom.student(RING, teacher, sigma_mean=-4.0, sigma_std=0.3, **SHORT)
    assert not torch.equal(usual, flipped.samples) and not torch.equal(usual, at_low.samples)


def test_a_student_that_diverges_says_so_in_its_warnings(teacher):
    run = classroom.student(RING, teacher, lambda *triple: sim.sim_loss(*triple, "l2") * torch.nan, **SHORT)
    assert [line for line in run.warnings if "no longer finite" in line]


def test_quiet_keeps_what_is_said_to_itself(capsys):
    with classroom.quiet() as told:
        print("aside", file=sys.stderr)
    assert told.getvalue() == "aside\n" and capsys.readouterr().err == ""


def test_a_judgement_needs_samples_on_the_target(teacher, monkeypatch):
    monkeypatch.setattr(classroom, "show", lambda figure: None)
    judge = partial(classroom.judge, None, RING, teacher, sharp=0.75, energy=0.02)
    good = RING.sample(2000, classroom.rng(1))
    for samples, words in (
        (good * torch.nan, "no longer finite"),
        (good[:1].expand(2000, 2), "1 of 8 modes"),
        (0.5 * good, "0 of 8 modes"),
        (good + 0.2, "not on the target"),
    ):
        monkeypatch.setattr(classroom, "train", lambda *given, samples=samples: samples)
        with pytest.raises(Wrong, match=words):
            judge()
    monkeypatch.setattr(classroom, "train", lambda *given: good)
    assert judge().startswith("8 of 8 modes, 99% of one-step samples")
