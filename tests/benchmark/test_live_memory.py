"""Live bytes against cases counted by hand; a float takes 4 bytes."""

from __future__ import annotations

import torch

from eellm.benchmark.live_memory import LiveStorages, peak_bytes

N = 1000
BYTES = 4 * N


def chain(length: int) -> None:
    """Each link needs its predecessor only."""
    x = torch.zeros(N)
    for _ in range(length):
        x = x + 1


def test_a_chain_holds_two_links_at_a_time() -> None:
    assert peak_bytes(lambda: chain(0)) == BYTES
    assert peak_bytes(lambda: chain(1)) == peak_bytes(lambda: chain(50)) == 2 * BYTES


def test_what_autograd_saves_stays_until_its_backward_has_passed() -> None:
    leaf = torch.ones(N, requires_grad=True)
    leaf.grad = torch.zeros(N)

    def total(links: int) -> torch.Tensor:
        x = leaf
        for _ in range(links):
            x = x.exp()  # saves its result
        return x.sum()

    for links in (1, 10):
        with LiveStorages() as storages:
            total(links).backward()
        # the results and one gradient (each new gradient takes the place of the result it is made from), the sum and its gradient
        assert storages.peak == (links + 1) * BYTES + 2 * 4
        assert storages.current == 0


def test_freed_storages_are_taken_off_and_the_peak_stays() -> None:
    with LiveStorages() as storages:
        first = torch.zeros(N)
        second = torch.zeros(2 * N)
        assert storages.current == 3 * BYTES
        del first
        assert storages.current == 2 * BYTES
        third = torch.zeros(N // 2)
        del second, third
    assert storages.current == 0
    assert storages.peak == 3 * BYTES


def test_views_and_in_place_results_share_a_storage() -> None:
    with LiveStorages() as storages:
        x = torch.zeros(N)
        views = [x.view(10, -1), x[::2], x.t(), x.detach(), x.expand(5, N)]
        x.add_(1)
        views[1].mul_(2)
        assert storages.current == storages.peak == BYTES
        del x
        assert storages.current == BYTES, "its views keep it"
        del views
        assert storages.current == 0


def test_what_was_there_before_is_not_counted() -> None:
    weight, gradient = torch.zeros(N, requires_grad=True), torch.zeros(N)
    with LiveStorages() as storages:
        alias = weight.view(10, -1)
        gradient.add_(1)
        torch.mul(gradient, 2, out=gradient)
        assert storages.current == 0
        product = alias * 2
        assert storages.current == BYTES
        del product
    assert storages.peak == BYTES


def test_a_result_written_into_an_empty_tensor() -> None:
    with LiveStorages() as storages:
        result = torch.empty(0)
        torch.zeros(N, out=result)
        assert storages.current == BYTES


def test_what_outlives_the_mode_may_go_later() -> None:
    with LiveStorages() as storages:
        x = torch.zeros(N)
    del x
    assert storages.current == 0


def test_several_outputs_and_lists_of_tensors() -> None:
    with LiveStorages() as storages:
        values, indices = torch.zeros(N).sort()  # int64 indices
        assert storages.current == BYTES + 2 * BYTES
        parts = torch.cat([values, values]).split(N)
        assert storages.current == 3 * BYTES + 2 * BYTES
        del values, indices, parts
        assert storages.current == 0
