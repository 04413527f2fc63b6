"""The distillation loss, computed from hidden states a few tokens at a time.

No `[B, T, V]` array is ever made: each piece of the sequence is unembedded, compared and differentiated at once, so
the backward pass has nothing to recompute. That is what the custom gradient is for.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dms_jax import dms, sharding
from dms_jax.types import Residual


def distillation_loss(
    teacher_hidden: Residual,
    student_hidden: Residual,
    teacher_kernel: Float[Array, "E V"],
    student_kernel: Float[Array, "E V"],
    real: Bool[Array, "B T"],
    direction: str,
    chunk: int = 256,
    train_kernel: bool = True,
) -> Float[Array, ""]:
    """The sum over real tokens of the KL between teacher and student, in nats; no gradient reaches the teacher.

    Args:
      teacher_kernel, student_kernel: unembeddings; logits are float32 whatever the dtype of these.
      direction: "forward" is KL(teacher, student), "reverse" KL(student, teacher).
      chunk: tokens a row whose logits exist at once.
      train_kernel: whether `student_kernel` gets a gradient; False saves the memory and the product for it.
    """

    def summed(rows, kernels):
        (sh, th, r), (sk, tk) = rows, kernels
        return _kl_sum(sh, sk, th, tk, r, direction, chunk, train_kernel)

    run = sharding.by_rows(summed, ". V")
    return run((student_hidden, teacher_hidden, real), [student_kernel, teacher_kernel])


def _pieces(x: Array, chunk: int) -> Array:
    """`[B, T, ...]` -> `[pieces, B, chunk, ...]`, padded with zeros."""
    B, T = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _zeros(shape, rows: Array) -> Array:
    """float32 zeros that differ from device to device as far as `rows` does: what a scan there starts from."""
    return jnp.zeros(shape, jnp.float32) + jnp.sum(rows[:0])


def _logits(hidden: Array, kernel: Array) -> Array:
    return jnp.einsum("BTE,EV->BTV", hidden, kernel, preferred_element_type=jnp.float32)


def _piece_loss(student: Array, teacher: Array, real: Array, direction: str) -> Array:
    """Of a piece's logits, the sum of the KL over real tokens."""
    return jnp.sum(jnp.where(real, dms.kl(teacher, student, direction), 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _kl_sum(sh, sk, th, tk, real, direction, chunk, train_kernel):
    chunk = min(chunk, sh.shape[1])

    def add(total, piece):
        s, t, r = piece
        return total + _piece_loss(_logits(s, sk), _logits(t, tk), r, direction), None

    # A scan, since XLA would hold the logits of unrolled pieces all at once.
    return jax.lax.scan(add, _zeros((), real), tuple(_pieces(x, chunk) for x in (sh, th, real)))[0]


def _forward(sh, sk, th, tk, real, direction, chunk, train_kernel):
    chunk = min(chunk, sh.shape[1])
    B, T, E = sh.shape

    def add(carry, piece):
        total, kernel_grad = carry
        s, t, r = piece
        value, grad = jax.value_and_grad(_piece_loss)(_logits(s, sk), _logits(t, tk), r, direction)
        grad = grad.astype(s.dtype)  # products in float32 would cost a GPU ten times those in bfloat16
        hidden_grad = jnp.einsum("BTV,EV->BTE", grad, sk, preferred_element_type=jnp.float32).astype(s.dtype)
        if train_kernel:
            kernel_grad += jnp.einsum("BTE,BTV->EV", s, grad, preferred_element_type=jnp.float32)
        return (total + value, kernel_grad), hidden_grad

    start = (_zeros((), real), _zeros(sk.shape if train_kernel else (), real))
    (total, kernel_grad), pieces = jax.lax.scan(add, start, tuple(_pieces(x, chunk) for x in (sh, th, real)))
    hidden_grad = pieces.swapaxes(0, 1).reshape(B, -1, E)[:, :T]
    return total, (hidden_grad, kernel_grad, sk, th, tk)


def _backward(direction, chunk, train_kernel, saved, cotangent):
    hidden_grad, kernel_grad, sk, th, tk = saved
    kernel_grad = (kernel_grad * cotangent).astype(sk.dtype) if train_kernel else jnp.zeros_like(sk)
    hidden_grad = (hidden_grad * cotangent).astype(hidden_grad.dtype)
    return hidden_grad, kernel_grad, jnp.zeros_like(th), jnp.zeros_like(tk), None


_kl_sum.defvjp(_forward, _backward)
