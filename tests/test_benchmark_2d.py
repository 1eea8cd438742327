"""toy/benchmark.py counts what a step computes."""

import re

import torch

from toy import benchmark


def test_the_products_are_those_of_a_step(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "STEPS", 1)
    assert benchmark.cli(["--width", "8", "--batch", "16", "--threads", "1"]) == 0
    step, count, products, ratio = re.search(
        r"takes ([\d.]+) ms, its (\d+) matrix products ([\d.]+) ms\n  ([\d.]+) times", capsys.readouterr().out
    ).groups()
    # Five linear maps in each of: g for psi, psi, g for theta, psi, teacher.  Backward, by the weights of psi
    # and of theta, five each; by the inputs of three; of psi and the teacher within theta's loss, of four.
    assert int(count) == 5 * 5 + 2 * (5 + 3) + 2 * 4
    assert float(step) > float(products) > 0 and float(ratio) > 1


def test_products_are_called_again_on_the_same_matrices():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with benchmark.Products() as products:
        product, _ = a @ b, a * 2
    assert len(products.calls) == 1 and torch.equal(products.calls[0][1][0], a)
    with benchmark.Products() as again:
        products.again()
    assert len(again.calls) == 1 and torch.equal(again.calls[0][1][1], b) and product.shape == (3, 5)
