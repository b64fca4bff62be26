"""Compiled code is called directly for sizes that torch.compile has seen, and for no others."""

import gc
import threading
import weakref

import pytest
import torch

from syncbn.backends import compiled_calls


def kernel(x, others, power, is_last):
    total = x + others[0]
    for other in others[1:]:
        total = total + other
    return total**power, None, total.sum(0)


def check(*args):
    torch.testing.assert_close(compiled_calls.run(kernel, *args), kernel(*args))


@pytest.fixture(autouse=True)
def searches(monkeypatch):
    """Let graphs run as they are, and count how often torch.compile looks for one."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, example_inputs, options: graph.forward)
    search, found = compiled_calls._through_torch_compile, []

    def counted(*args):
        found.append(None)
        return search(*args)

    monkeypatch.setattr(compiled_calls, "_through_torch_compile", counted)
    compiled_calls.forget()
    compiled_calls._compiled.cache_clear()
    yield found
    compiled_calls.forget()
    compiled_calls._compiled.cache_clear()


def operands(rows, columns=5, dtype=torch.float64):
    return torch.randn(rows, columns, dtype=dtype), [torch.randn(columns, dtype=dtype) for _ in range(2)]


def test_known_sizes_are_called_directly_with_the_tensors_at_hand(searches):
    for rows in (3, 4, 7, 4, 3, 7):
        for _ in range(2):
            check(*operands(rows), 2, False)
    assert len(searches) == 3


def test_whatever_else_code_depends_on_leads_through_torch_compile(searches):
    x, others = operands(3)
    threads = torch.get_num_threads()
    for number, args in enumerate(
        [
            (x, others, 2, False),
            (x, others, 3, False),
            (x, others[:1], 3, False),
            (x.T.contiguous().T, others, 2, False),
            (*operands(3, dtype=torch.float32), 2, False),
            (x, [others[0], torch.stack(others, 1)[:, 0]], 2, False),
        ],
        start=1,
    ):
        for _ in range(2):
            check(*args)
        assert len(searches) == number
    torch.set_num_threads(threads + 1)
    check(x, others, 2, False)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        check(x, others, 2, False)
    assert len(searches) == 8


def test_one_tensor_in_two_places_is_not_taken_for_one_operand(searches):
    x, others = operands(3)
    check(x, [others[0], others[0]], 2, False)
    check(x, others, 2, False)
    check(*operands(3), 2, False)
    check(x, [others[1], others[1]], 2, False)
    assert len(searches) == 1


def test_what_all_arguments_follow_from_may_be_given_in_their_place(searches):
    def of(x, power):
        others = [x[0], x.T.contiguous()[:, 0]]
        expected = kernel(x, others, power, False)
        found = compiled_calls.run(kernel, x, others, power, False, given=(x, power))
        torch.testing.assert_close(found, expected)

    for x in (*operands(5)[:1], *operands(5)[:1], torch.randn(5, 5, dtype=torch.float64).T):
        of(x, 2)
        of(x, 3)
    assert len(searches) == 4


def test_a_view_is_an_operand_like_any_other_tensor(searches):
    x, others = operands(6)
    parameter = torch.nn.Parameter(torch.randn(2, 5, dtype=torch.float64))
    for _ in range(2):
        compiled_calls.run(kernel, x[::2], [parameter[0], parameter.as_strided((5,), (1,), 5)], 2, False)
        check(x[::2], [others[0], parameter.detach()[1]], 2, False)
    assert len(searches) == 1


def test_a_tensor_of_another_type_or_device_leads_through_torch_compile(searches):
    class Own(torch.Tensor):
        pass

    x, others = operands(3)
    check(x, others, 2, False)
    for number in (2, 3):
        check(x, [others[0].as_subclass(Own), others[1]], 2, False)
        assert len(searches) == number
    with pytest.raises(RuntimeError, match="meta"):
        compiled_calls.run(kernel, x, [others[0], others[1].to("meta")], 2, False)
    assert len(searches) == 4


def test_a_stance_without_compilation_leaves_no_trace(searches):
    x, others = operands(3)
    with torch.compiler.set_stance("force_eager"):
        check(x, others, 2, False)
    check(x, others, 2, False)
    check(x, others, 2, False)
    assert len(searches) == 2


def test_only_so_many_sizes_are_known_at_a_time(searches, monkeypatch):
    monkeypatch.setattr(compiled_calls, "MAX_CALLS", 2)
    for rows in (3, 4, 7, 8, 3):
        check(*operands(rows), 2, False)
        assert len(compiled_calls._calls) <= 2
    assert len(searches) == 5


def test_no_tensor_is_kept():
    for shared in (False, True):
        for _ in range(2):
            x, others = operands(3)
            results = compiled_calls.run(kernel, x, [others[0], others[0]] if shared else others, 2, False)
            kept = [weakref.ref(tensor) for tensor in (x, *others, results[0], results[2])]
            del x, others, results
            gc.collect()
            assert not any(tensor() is not None for tensor in kept)


def test_threads_do_not_mix_up_their_calls():
    failures = []

    def work(rows):
        try:
            for columns in range(2, 12):
                for _ in range(3):
                    check(*operands(rows, columns), 2, False)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
