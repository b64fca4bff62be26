"""The oracle agrees with torch in float64, with finite differences, and with itself."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from syncbn import reference

SHAPES = [(7, 5), (4, 3, 6), (3, 4, 2, 5), (2, 3, 2, 3, 2)]
# Both sides round about 100 additions of numbers near 1 to 1e-16, so they agree to 1e-14; a wrong formula errs by 1e-2.
ATOL = 1e-12
# Central differences at h = 1e-5: the truncation error is near 1e-9, and larger for small gradients (cancellation).
NUMERICAL_ERROR = 1e-6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn_input(rng, shape):
    """Return random input with a different mean and scale in every channel."""
    channels = (shape[1], *(1,) * (len(shape) - 2))
    return rng.normal(size=shape) * rng.uniform(0.5, 3, channels) + rng.normal(size=channels)


def drawn_parameters(rng, shape, affine=True):
    return (rng.normal(size=shape), rng.normal(size=shape)) if affine else (None, None)


def drawn_running_stats(rng, channels):
    return reference.RunningStats(rng.normal(size=channels), rng.uniform(0.5, 2, channels))


def torch_forward_backward(f, grad_output, *inputs):
    """Return f(*inputs) and its gradients for the inputs that are not None, by autograd in float64."""
    tensors = [None if value is None else torch.tensor(value, requires_grad=True) for value in inputs]
    output = f(*tensors)
    gradients = torch.autograd.grad(
        output, [tensor for tensor in tensors if tensor is not None], torch.tensor(grad_output)
    )
    return output.detach().numpy(), [gradient.numpy() for gradient in gradients]


def assert_close(actual, expected, atol=ATOL):
    np.testing.assert_allclose(actual, expected, rtol=atol, atol=atol, strict=True)


def assert_all_close(actual, expected):
    """Compare as many results as are expected: torch has no gradient if the weight is None."""
    for one, other in zip(actual, expected, strict=False):
        assert_close(one, other)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_batch_norm_and_its_gradients_equal_torch(rng, shape, affine):
    x, grad_output = drawn_input(rng, shape), rng.normal(size=shape)
    weight, bias = drawn_parameters(rng, shape[1], affine)

    def f(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)

    output, gradients = torch_forward_backward(f, grad_output, x, weight, bias)
    assert_close(reference.batch_norm(x, weight=weight, bias=bias, eps=1e-3).output, output)
    assert_all_close(reference.batch_norm_backward(grad_output, x, weight=weight, eps=1e-3), gradients)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_statistics_are_those_of_each_channel_over_batch_and_space(rng, shape):
    x = drawn_input(rng, shape)
    _, mean, var, invstd, count = reference.batch_norm(x, eps=1e-3)
    per_channel = np.moveaxis(x, 1, 0).reshape(shape[1], -1)
    assert count == per_channel.shape[1]
    assert_close(mean, per_channel.mean(1))
    assert_close(var, per_channel.var(1))
    assert_close(invstd, (per_channel.var(1) + 1e-3) ** -0.5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stepwise_backward_equals_the_closed_formula(rng, shape, affine):
    x, grad_output = drawn_input(rng, shape), rng.normal(size=shape)
    weight, _ = drawn_parameters(rng, shape[1], affine)
    closed = reference.batch_norm_backward(grad_output, x, weight=weight, eps=0.1)
    stepwise = reference.batch_norm_backward_stepwise(grad_output, x, weight=weight, eps=0.1)
    for one, other in zip(stepwise, closed, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("backward", [reference.batch_norm_backward, reference.batch_norm_backward_stepwise])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_gradients_equal_finite_differences(rng, shape, backward):
    x, grad_output = drawn_input(rng, shape), rng.normal(size=shape)
    weight, bias = drawn_parameters(rng, shape[1])

    def output(x=x, weight=weight, bias=bias):
        return reference.batch_norm(x, weight=weight, bias=bias).output

    gradients = backward(grad_output, x, weight=weight)
    for name, value, gradient in zip(("x", "weight", "bias"), (x, weight, bias), gradients, strict=True):
        numerical = reference.numerical_gradient(lambda v, name=name: output(**{name: v}), value, grad_output)
        assert reference.relative_error(gradient, numerical) < NUMERICAL_ERROR


def test_spatial_batch_norm_is_dense_batch_norm_over_all_positions(rng):
    x, grad_output = drawn_input(rng, (3, 4, 2, 5)), rng.normal(size=(3, 4, 2, 5))
    weight, bias = drawn_parameters(rng, 4)

    def dense(images):
        return images.transpose(0, 2, 3, 1).reshape(-1, 4)

    spatial = reference.batch_norm(x, weight=weight, bias=bias).output
    assert_close(dense(spatial), reference.batch_norm(dense(x), weight=weight, bias=bias).output)
    spatial_gradients = reference.batch_norm_backward(grad_output, x, weight=weight)
    dense_gradients = reference.batch_norm_backward(dense(grad_output), dense(x), weight=weight)
    assert_close(dense(spatial_gradients.grad_input), dense_gradients.grad_input)
    assert_all_close(spatial_gradients[1:], dense_gradients[1:])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_batch_norm_and_its_gradients_equal_torch(rng, shape, affine):
    x, grad_output, running = drawn_input(rng, shape), rng.normal(size=shape), drawn_running_stats(rng, shape[1])
    weight, bias = drawn_parameters(rng, shape[1], affine)
    buffers = torch.tensor(running.running_mean), torch.tensor(running.running_var)

    def f(x, weight, bias):
        return F.batch_norm(x, *buffers, weight, bias, training=False, eps=1e-3)

    output, gradients = torch_forward_backward(f, grad_output, x, weight, bias)
    assert_close(reference.batch_norm_eval(x, running, weight=weight, bias=bias, eps=1e-3), output)
    backward = reference.batch_norm_eval_backward(grad_output, x, running=running, weight=weight, eps=1e-3)
    assert_all_close(backward, gradients)


def test_evaluation_gradients_equal_finite_differences(rng):
    x, grad_output, running = drawn_input(rng, (4, 3)), rng.normal(size=(4, 3)), drawn_running_stats(rng, 3)
    weight, _ = drawn_parameters(rng, 3)
    gradients = reference.batch_norm_eval_backward(grad_output, x, running=running, weight=weight)
    of_x = reference.numerical_gradient(lambda x: reference.batch_norm_eval(x, running, weight=weight), x, grad_output)
    of_weight = reference.numerical_gradient(
        lambda weight: reference.batch_norm_eval(x, running, weight=weight), weight, grad_output
    )
    assert reference.relative_error(gradients.grad_input, of_x) < NUMERICAL_ERROR
    assert reference.relative_error(gradients.grad_weight, of_weight) < NUMERICAL_ERROR


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_folding_gives_one_scale_and_shift_with_the_same_output(rng, shape, affine):
    x, running = drawn_input(rng, shape), drawn_running_stats(rng, shape[1])
    weight, bias = drawn_parameters(rng, shape[1], affine)
    scale, shift = reference.fold_batch_norm(running, weight=weight, bias=bias, eps=1e-3)
    assert scale.shape == shift.shape == (shape[1],)
    folded = np.moveaxis(np.moveaxis(x, 1, -1) * scale + shift, -1, 1)
    assert_close(folded, reference.batch_norm_eval(x, running, weight=weight, bias=bias, eps=1e-3))


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0, 0.0, None])
@pytest.mark.parametrize(
    "layer_class, shape",
    [
        (torch.nn.BatchNorm1d, (6, 3)),
        (torch.nn.BatchNorm1d, (4, 3, 5)),
        (torch.nn.BatchNorm2d, (2, 3, 4, 2)),
        (torch.nn.BatchNorm3d, (2, 3, 2, 2, 3)),
    ],
)
def test_running_statistics_follow_torch_over_several_batches(rng, layer_class, shape, momentum):
    layer = layer_class(3, momentum=momentum, dtype=torch.float64)
    running = reference.RunningStats(np.zeros(3), np.ones(3))
    for batch_size in (shape[0], 2, 7):
        x = drawn_input(rng, (batch_size, *shape[1:]))
        layer(torch.tensor(x))
        _, mean, var, _, count = reference.batch_norm(x)
        running = reference.update_running_stats(running, mean=mean, var=var, count=count, momentum=momentum)
        assert_close(running.running_mean, layer.running_mean.numpy())
        assert_close(running.running_var, layer.running_var.numpy())
        assert running.num_batches_tracked == layer.num_batches_tracked.item()


def test_the_momentum_0_9_of_the_texts_is_momentum_0_1_with_biased_variance(rng):
    running_mean, running_var = rng.normal(size=3), rng.uniform(0.5, 2, 3)
    x = drawn_input(rng, (5, 3))
    updated = reference.update_running_stats(
        reference.RunningStats(running_mean, running_var),
        mean=x.mean(0),
        var=x.var(0),
        count=5,
        momentum=0.1,
        unbiased=False,
    )
    assert_close(updated.running_mean, 0.9 * running_mean + 0.1 * x.mean(0))
    assert_close(updated.running_var, 0.9 * running_var + 0.1 * x.var(0))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_of_no_values_leaves_the_running_statistics_alone(rng, momentum):
    running = drawn_running_stats(rng, 3)._replace(num_batches_tracked=2)
    _, mean, var, _, count = reference.batch_norm(np.empty((0, 3, 4)))
    updated = reference.update_running_stats(running, mean=mean, var=var, count=count, momentum=momentum)
    assert_all_close(updated[:2], running[:2])
    assert updated.num_batches_tracked == 2


@pytest.mark.parametrize("eps", [1e-5, 0])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0)])
def test_an_empty_batch_gives_empty_outputs_and_zero_sums_without_warnings(shape, eps):
    x, weight, bias = np.empty(shape), np.ones(3), np.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, mean, var, _, count = reference.batch_norm(x, weight=weight, bias=bias, eps=eps)
        gradients = reference.batch_norm_backward(x, x, weight=weight, eps=eps)
        eval_output = reference.batch_norm_eval(x, reference.RunningStats(np.zeros(3), np.ones(3)), eps=eps)
    assert output.shape == eval_output.shape == gradients.grad_input.shape == shape
    assert count == 0
    for per_channel in (mean, var, gradients.grad_weight, gradients.grad_bias):
        assert_close(per_channel, np.zeros(3))


def test_a_single_value_per_channel_gives_the_bias(rng):
    x, bias = rng.normal(size=(1, 3)), rng.normal(size=3)
    assert_close(reference.batch_norm(x, bias=bias).output, bias[None])


def test_an_offset_of_two_to_the_thirty_does_not_change_the_result(rng):
    # Multiples of 2**-20 remain exact after adding the offset, so only the oracle's arithmetic can cause differences.
    x = np.round(rng.normal(size=(1000, 3)) * 2**20) / 2**20
    near, far = reference.batch_norm(x), reference.batch_norm(x + 2.0**30)
    assert_close(far.mean, near.mean + 2.0**30, atol=1e-16)
    assert_close(far.var, near.var, atol=1e-14)
    assert_close(far.output, near.output, atol=1e-13)


def test_float32_input_is_computed_in_float64_and_left_alone(rng):
    x = drawn_input(rng, (4, 3)).astype(np.float32)
    before = x.copy()
    output = reference.batch_norm(x).output
    assert output.dtype == np.float64
    np.testing.assert_array_equal(output, reference.batch_norm(before.astype(np.float64)).output)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_have_mean_bias_and_standard_deviation_weight(rng, shape):
    weight, bias = rng.uniform(0.5, 2, shape[1]), rng.normal(size=shape[1])
    output = reference.batch_norm(drawn_input(rng, shape), weight=weight, bias=bias, eps=0).output
    axes = (0, *range(2, len(shape)))
    assert_close(output.mean(axes), bias)
    assert_close(output.std(axes), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_std_and_bias_mean_restore_the_input(rng, shape):
    x = drawn_input(rng, shape)
    axes = (0, *range(2, len(shape)))
    assert_close(reference.batch_norm(x, weight=x.std(axes), bias=x.mean(axes), eps=0).output, x)


def test_scaling_the_weights_before_batch_norm_changes_neither_output_nor_jacobian_and_shrinks_their_gradient(rng):
    u, w, grad_output, a = rng.normal(size=(6, 4)), rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), 7.0
    gamma, beta = drawn_parameters(rng, 3)

    def forward_backward(w):
        z = u @ w
        grad_z = reference.batch_norm_backward(grad_output, z, weight=gamma, eps=0).grad_input
        return reference.batch_norm(z, weight=gamma, bias=beta, eps=0).output, grad_z @ w.T, u.T @ grad_z

    output, grad_u, grad_w = forward_backward(w)
    scaled_output, scaled_grad_u, scaled_grad_w = forward_backward(a * w)
    assert_close(scaled_output, output)
    assert_close(scaled_grad_u, grad_u)
    assert_close(scaled_grad_w, grad_w / a)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shape, normalized_shape", [((5, 7), (7,)), ((2, 3, 4), (4,)), ((2, 3, 4, 5), (3, 4, 5)), ((6,), (6,))]
)
def test_layer_norm_and_its_gradients_equal_torch(rng, shape, normalized_shape, affine):
    x, grad_output = rng.normal(size=shape) * 2 + 3, rng.normal(size=shape)
    weight, bias = drawn_parameters(rng, normalized_shape, affine)

    def f(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps=1e-3)

    output, gradients = torch_forward_backward(f, grad_output, x, weight, bias)
    assert_close(reference.layer_norm(x, normalized_shape, weight=weight, bias=bias, eps=1e-3), output)
    backward = reference.layer_norm_backward(grad_output, x, normalized_shape=normalized_shape, weight=weight, eps=1e-3)
    assert_all_close(backward, gradients)


def test_layer_norm_is_batch_norm_of_the_transposed_input(rng):
    x = drawn_input(rng, (5, 7))
    assert_close(reference.layer_norm(x, (7,)), reference.batch_norm(x.T).output.T)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(4, 6, 3), (3, 6, 2, 4), (2, 6, 2, 2, 2)])
def test_group_norm_and_its_gradients_equal_torch(rng, shape, num_groups, affine):
    x, grad_output = drawn_input(rng, shape), rng.normal(size=shape)
    weight, bias = drawn_parameters(rng, 6, affine)

    def f(x, weight, bias):
        return F.group_norm(x, num_groups, weight, bias, eps=1e-3)

    output, gradients = torch_forward_backward(f, grad_output, x, weight, bias)
    assert_close(reference.group_norm(x, num_groups, weight=weight, bias=bias, eps=1e-3), output)
    backward = reference.group_norm_backward(grad_output, x, num_groups=num_groups, weight=weight, eps=1e-3)
    assert_all_close(backward, gradients)


def test_layer_and_group_norm_gradients_equal_finite_differences(rng):
    x, grad_output = drawn_input(rng, (2, 4, 3)), rng.normal(size=(2, 4, 3))
    per_element, per_channel = rng.normal(size=(4, 3)), rng.normal(size=4)
    layer = reference.layer_norm_backward(grad_output, x, normalized_shape=(4, 3), weight=per_element)
    group = reference.group_norm_backward(grad_output, x, num_groups=2, weight=per_channel)
    numerical_layer = reference.numerical_gradient(
        lambda x: reference.layer_norm(x, (4, 3), weight=per_element), x, grad_output
    )
    numerical_group = reference.numerical_gradient(
        lambda x: reference.group_norm(x, 2, weight=per_channel), x, grad_output
    )
    assert reference.relative_error(layer.grad_input, numerical_layer) < NUMERICAL_ERROR
    assert reference.relative_error(group.grad_input, numerical_group) < NUMERICAL_ERROR


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_drops_the_share_p_and_keeps_the_mean(rng, p):
    n = 100_000
    output, mask = reference.dropout(np.full(n, 3.0), p, generator=rng)
    np.testing.assert_array_equal(np.unique(mask), [0, 1 / (1 - p)])
    # five standard deviations of a mean of n Bernoulli variables
    tolerance = 5 * np.sqrt(p * (1 - p) / n)
    assert abs((mask == 0).mean() - p) < tolerance
    assert abs(output.mean() - 3) < 3 * tolerance / (1 - p)


def test_dropout_multiplies_by_its_mask_forward_and_backward(rng):
    x, grad_output = rng.normal(size=(20, 5)), rng.normal(size=(20, 5))

    def dropped(x):
        return reference.dropout(x, 0.4, generator=np.random.default_rng(1))

    output, mask = dropped(x)
    assert_close(output, x * mask)
    numerical = reference.numerical_gradient(lambda x: dropped(x).output, x, grad_output)
    assert_close(reference.dropout_backward(grad_output, mask), numerical, atol=1e-9)


def test_dropout_depends_on_nothing_but_its_generator(rng):
    x = rng.normal(size=(20, 5))
    first, again, other = (reference.dropout(x, 0.5, generator=np.random.default_rng(seed)).mask for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_dropout_with_p_0_is_the_identity(rng):
    x = rng.normal(size=(20, 5))
    np.testing.assert_array_equal(reference.dropout(x, 0, generator=rng).output, x)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_dropout_refuses_a_probability_outside_0_to_1(rng, p):
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\), got"):
        reference.dropout(np.ones(3), p, generator=rng)


def test_the_numerical_gradient_of_a_linear_function_is_its_transposed_matrix(rng):
    matrix, x, grad_output = rng.normal(size=(3, 4)), rng.normal(size=4), rng.normal(size=3)
    numerical = reference.numerical_gradient(lambda x: matrix @ x, x, grad_output)
    assert_close(numerical, matrix.T @ grad_output, atol=1e-9)


def test_the_numerical_gradient_takes_its_step_from_h():
    # the central difference of x^3 at 0 is h^2
    numerical = reference.numerical_gradient(lambda x: x**3, np.zeros(1), np.ones(1), h=0.5)
    assert_close(numerical, np.array([0.25]))


@pytest.mark.parametrize(
    "x, y, expected", [([1.0, 2.0], [1.0, 2.0], 0), ([3.0, 2.0], [1.0, 2.0], 0.5), ([-1.0], [1.0], 1), ([], [], 0)]
)
def test_the_relative_error_is_the_largest_difference_over_the_sum_of_sizes(x, y, expected):
    assert reference.relative_error(x, y) == expected


def test_the_relative_error_of_tiny_values_is_taken_against_1e_8():
    assert reference.relative_error([1e-9], [-1e-9]) == pytest.approx(0.2)


def test_the_relative_error_of_nan_is_nan_and_so_passes_no_bound():
    assert np.isnan(reference.relative_error([1.0, np.nan], [1.0, 1.0]))


X = np.arange(12.0).reshape(2, 6)
RUNNING = reference.RunningStats(np.zeros(6), np.ones(6))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reference.batch_norm(np.ones(3)), r"expected input of shape \(N, C\)"),
        (lambda: reference.batch_norm(X, weight=np.ones(5)), r"expected weight of shape \(6,\), got \(5,\)"),
        (lambda: reference.batch_norm(X, bias=np.ones((1, 6))), r"expected bias of shape \(6,\), got \(1, 6\)"),
        (lambda: reference.batch_norm(X, eps=-1e-5), "expected eps >= 0, got -1e-05"),
        (lambda: reference.batch_norm(X, eps=float("nan")), "expected eps >= 0, got nan"),
        (lambda: reference.batch_norm_backward(X[:1], X), r"expected grad_output of shape \(2, 6\)"),
        (lambda: reference.batch_norm_backward_stepwise(X[:1], X), r"expected grad_output of shape \(2, 6\)"),
        (lambda: reference.batch_norm_eval_backward(X[:1], X, running=RUNNING), "expected grad_output of shape"),
        (lambda: reference.batch_norm_eval(X[:, :5], RUNNING), r"expected running_mean of shape \(5,\), got \(6,\)"),
        (lambda: reference.batch_norm_eval(X, RUNNING._replace(running_mean=None)), "expected running_mean of shape"),
        (lambda: reference.fold_batch_norm(RUNNING, weight=np.ones(5)), "expected weight of shape"),
        (lambda: reference.layer_norm(X, (5,)), r"ends in normalized_shape \(5,\), got \(2, 6\)"),
        (lambda: reference.layer_norm(X, ()), r"ends in normalized_shape \(\)"),
        (lambda: reference.group_norm(X, 4), "expected num_groups to divide the 6 channels of the input, got 4"),
        (lambda: reference.group_norm(X, 0), "expected num_groups to divide the 6 channels of the input, got 0"),
        (lambda: reference.dropout_backward(X, X[:1]), "expected grad_output of shape"),
        (lambda: reference.numerical_gradient(lambda x: x, X, X[:1]), "expected grad_output of shape"),
        (lambda: reference.relative_error(X, X[:1]), r"expected two arrays of one shape, got \(2, 6\) and \(1, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"momentum": 1.5}, r"expected momentum in \[0, 1\] or None, got 1.5"),
        ({"momentum": -0.1}, r"expected momentum in \[0, 1\] or None, got -0.1"),
        ({"mean": np.zeros((6, 1))}, r"expected statistics of one shape \(C,\), .* mean \(6, 1\)"),
        ({"count": 1}, "expected more than 1 value per channel for an unbiased variance"),
    ],
)
def test_a_running_update_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        reference.update_running_stats(RUNNING, **({"mean": np.zeros(6), "var": np.ones(6), "count": 4} | changes))
