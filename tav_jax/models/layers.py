"""Dense, convolution and normalisation layers that carry the checkpoint's parameters.

A layer computes in the type of its input. Its parameters may be stored in any type. Statistics of
the norms are always float32. Convolutions and group norms take any number of axes
between the batch and `h w c`, so one residual block serves images and videos.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from tav_jax.models import backend
from tav_jax.models.group_norm import Parts, group_norm, split_as
from tav_jax.types import PRNGKey


class NoRngs(nnx.Rngs):
    """Given to a module instead of a source of randomness, it leaves shapes in place of values."""

    def __init__(self) -> None:
        pass  # A key would be an operation on a device, which may not be here.


def draw(
    rngs: nnx.Rngs, sampler: Callable[[PRNGKey, tuple[int, ...]], Array], shape: tuple[int, ...]
) -> Array | jax.ShapeDtypeStruct:
    """Return a new random array, or its shape alone if there is no source of randomness."""
    if isinstance(rngs, NoRngs):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return sampler(rngs.params(), shape)


def fan_in_uniform(key: PRNGKey, shape: tuple[int, ...]) -> Array:
    """Return a kernel drawn from U(+-1/sqrt(fan_in)), PyTorch's default for Linear and Conv2d.

    So new temporal layers, and networks trained from scratch, start as in the published code.

    Args:
        key: Random key.
        shape: Shape of the kernel. Its last axis is the output's, and all others are fan-in.
    """
    size = math.prod(shape)
    # JAX compiles the draw once for each length. Powers of two keep the number of lengths small.
    draws = jax.random.uniform(key, (1 << (size - 1).bit_length(),), minval=-1.0, maxval=1.0)
    return draws[:size].reshape(shape) / math.sqrt(size // shape[-1])


def along_channels(vector: Float[Array, "c"], x: Float[Array, "*axes c"]) -> Array:
    """Return `vector` in the type of `x`, shaped so that it broadcasts along x's last axis."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def layer_norm(
    x: Float[Array, "*axes c"], scale: Float[Array, "c"], bias: Float[Array, "c"], *, eps: float
) -> Float[Array, "*axes c"]:
    """Return x with zero mean and unit variance over its channels, then scaled."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    normed = (wide - mean) * jax.lax.rsqrt(variance + eps)
    return (normed * along_channels(scale, normed) + along_channels(bias, normed)).astype(x.dtype)


_convolve = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    x: Float[Array, "n h w i"],
    kernel: Float[Array, "kh kw i o"],
    stride: int,
    padding: tuple[int, int],
) -> Float[Array, "n h2 w2 o"]:
    """Return the convolution of images with a kernel, channels last.

    Its gradient by `x` is written by hand for speed on the CPU. XLA would otherwise fold the
    kernel's transposition into the convolution, and has no fast code for that.

    Args:
        x: Images.
        kernel: Kernel.
        stride: Stride along both sides.
        padding: Zeros before and after both sides.
    """
    return _convolve(x, kernel, (stride, stride), (padding, padding))


def _convolution_forward(x: Array, kernel: Array, stride: int, padding: tuple[int, int]):
    return convolution(x, kernel, stride, padding), (x, kernel)


def _convolution_backward(
    stride: int, padding: tuple[int, int], inputs: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = inputs
    (dkernel,) = jax.linear_transpose(
        lambda kernel: _convolve(x, kernel, (stride, stride), (padding, padding)), kernel
    )(gradient)
    if backend.platform() == "gpu":
        (dx,) = jax.linear_transpose(
            lambda x: _convolve(x, kernel, (stride, stride), (padding, padding)), x
        )(gradient)
        return dx, dkernel
    # Without the barrier XLA would fold the transposition into the convolution.
    transposed = jax.lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))

    def pad(size: int, out: int, width: int) -> tuple[int, int]:
        before = width - 1 - padding[0]
        return before, size + width - 2 - (out - 1) * stride - before

    dx = _convolve(
        gradient,
        transposed,
        (1, 1),
        [pad(x.shape[i], gradient.shape[i], kernel.shape[i - 1]) for i in (1, 2)],
        lhs_dilation=(stride, stride),
    )
    return dx, dkernel


convolution.defvjp(_convolution_forward, _convolution_backward)


@jax.custom_vjp
def apart(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Return both, so that XLA does not merge their product with others of the same x.

    Having merged the products of one array with several small kernels, a GPU would have to copy
    each kernel into the merged one, and each result out of the merged one.
    """
    return jax.lax.optimization_barrier((x, kernel))


# The gradient needs no barrier, which would keep XLA from adding gradients as it multiplies.
apart.defvjp(lambda *both: (apart(*both), None), lambda _, gradients: gradients)


class Linear(nnx.Module):
    """A dense layer over the last axis.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        use_bias: Whether to add a bias.
        rngs: Source of randomness.
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(draw(rngs, fan_in_uniform, (in_features, out_features)))
        self.bias = nnx.Param(np.zeros(out_features, np.float32)) if use_bias else None

    def __call__(self, x: Float[Array, "*axes i"]) -> Float[Array, "*axes o"]:
        """Return x times the kernel, plus the bias."""
        kernel = self.kernel[...].astype(x.dtype)
        if backend.platform() == "gpu":
            x, kernel = apart(x, kernel)
        y = x @ kernel
        return y if self.bias is None else y + along_channels(self.bias[...], y)


class Conv(nnx.Module):
    """A convolution over `h w`. All leading axes are batch: over frames it is a 1x3x3 kernel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel.
        stride: Stride along both sides.
        padding: Zeros before and after both sides. None keeps the size at stride 1.
        rngs: Source of randomness.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(draw(rngs, fan_in_uniform, shape))
        self.bias = nnx.Param(np.zeros(out_channels, np.float32))
        self.stride = stride
        self.padding = (kernel_size // 2, kernel_size // 2) if padding is None else padding

    def __call__(
        self,
        x: Float[Array, "*axes h w i"],
        residual: Float[Array, "*axes h2 w2 o"] | None = None,
    ) -> Float[Array, "*axes h2 w2 o"]:
        """Return the convolution of x with the kernel, plus the bias, plus `residual`."""
        images = x.reshape(-1, *x.shape[-3:])
        y = convolution(images, self.kernel[...].astype(x.dtype), self.stride, self.padding)
        y = y + along_channels(self.bias[...], y)
        if residual is not None:
            # Before the frames are unfolded: XLA then adds both within cuDNN's convolution.
            y = y + residual.reshape(y.shape)
        return y.reshape(*x.shape[:-3], *y.shape[-3:])


class GroupNorm(nnx.Module):
    """`group_norm` with its parameters. The arguments are described there."""

    def __init__(self, num_groups: int, num_channels: int, *, eps: float, joint_frames: bool):
        self.scale = nnx.Param(np.ones(num_channels, np.float32))
        self.bias = nnx.Param(np.zeros(num_channels, np.float32))
        self.num_groups = num_groups
        self.eps = eps
        self.joint_frames = joint_frames

    def __call__(
        self,
        x: Float[Array, "b *axes _"] | Parts,
        shift: Float[Array, "b c"] | None = None,
        *,
        silu: bool = False,
    ) -> Float[Array, "b *axes c"]:
        """Return `group_norm` of x."""
        return group_norm(
            x,
            self.scale[...],
            self.bias[...],
            num_groups=self.num_groups,
            eps=self.eps,
            joint_frames=self.joint_frames,
            shift=shift,
            silu=silu,
        )


class LayerNorm(nnx.Module):
    """`layer_norm` with its parameters.

    Args:
        num_channels: Width of the last axis.
        eps: Added to the variance.
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(np.ones(num_channels, np.float32))
        self.bias = nnx.Param(np.zeros(num_channels, np.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes c"]) -> Float[Array, "*axes c"]:
        """Return `layer_norm` of x."""
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Embed(nnx.Module):
    """A table of vectors, looked up by index.

    Args:
        num_embeddings: Number of vectors.
        features: Width of each.
        rngs: Source of randomness.
    """

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs):
        def normal(key: PRNGKey, shape: tuple[int, ...]) -> Array:
            # CLIP's `initializer_factor` 1.0 gives tokens and positions this standard deviation.
            return 0.02 * jax.random.normal(key, shape)

        self.embedding = nnx.Param(draw(rngs, normal, (num_embeddings, features)))

    def __call__(self, indices: Int[Array, "*axes"]) -> Float[Array, "*axes c"]:
        """Return the vector of each index."""
        return self.embedding[...][indices]


class ResnetBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, plus a shortcut. The timestep is added in between.

    Follows diffusers' ResnetBlock2D and Tune-A-Video's ResnetBlock3D. The VAE calls it with images
    `n h w c` and no timestep, the U-Net with videos `b f h w c`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_embed_dim: Width of the timestep's embedding. None: there is no timestep.
        num_groups: Groups of channels of both norms.
        eps: Added to the variance in both norms.
        joint_frames: Whether a video's frames share the norms' statistics, see `group_norm`.
        rngs: Source of randomness.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_embed_dim: int | None = None,
        num_groups: int,
        eps: float,
        joint_frames: bool,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps, joint_frames=joint_frames)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs)
        self.time_emb_proj = (
            None if time_embed_dim is None else Linear(time_embed_dim, out_channels, rngs=rngs)
        )
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps, joint_frames=joint_frames)
        self.conv2 = Conv(out_channels, out_channels, rngs=rngs)
        self.conv_shortcut = (
            None if in_channels == out_channels else Conv(in_channels, out_channels, 1, rngs=rngs)
        )

    def __call__(
        self, x: Float[Array, "b *axes i"] | Parts, time_emb: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b *axes o"]:
        """Return the sum of the shortcut and the two convolutions' output.

        Args:
            x: The input. A tuple of arrays stands for their concatenation along the channels.
            time_emb: Embedding of each clip's timestep.
        """
        hidden = self.conv1(self.norm1(x, silu=True))
        shift = None
        if self.time_emb_proj is not None and time_emb is not None:
            shift = self.time_emb_proj(jax.nn.silu(time_emb))
        hidden = self.norm2(hidden, shift, silu=True)
        return self.conv2(hidden, self.shortcut(x))

    def shortcut(self, x: Float[Array, "b *axes i"] | Parts) -> Float[Array, "b *axes o"]:
        """Return x, by a 1x1 convolution if its width is not the output's."""
        if not isinstance(x, tuple):
            return x if self.conv_shortcut is None else self.conv_shortcut(x)
        if self.conv_shortcut is None:
            return jnp.concatenate(x, axis=-1)
        # The sum of each part's product with its rows of the kernel.
        kernels = split_as(x, self.conv_shortcut.kernel[...][0, 0], axis=0)
        products = [part @ k.astype(part.dtype) for part, k in zip(x, kernels, strict=True)]
        return sum(products, along_channels(self.conv_shortcut.bias[...], products[0]))


def upsample_nearest(
    x: Float[Array, "*axes h w c"], size: tuple[int, int]
) -> Float[Array, "*axes h2 w2 c"]:
    """Return x on a grid of `size`: point i is a copy of the source point floor(i h / h2).

    As PyTorch's `interpolate(size=..., mode="nearest")`. The size need not be a multiple of the
    old one: where down-sampling has rounded up, the U-Net gives the size of the skip connection.
    """
    h, w = x.shape[-3:-1]
    if size == (2 * h, 2 * w):
        return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
    rows = jnp.arange(size[0]) * h // size[0]
    columns = jnp.arange(size[1]) * w // size[1]
    return x[..., rows, :, :][..., columns, :]


class Downsample(nnx.Module):
    """A convolution of stride 2.

    Args:
        channels: Channels of input and output.
        padding: Zeros before and after both sides: (1, 1) in the U-Net, (0, 1) in the VAE.
        rngs: Source of randomness.
    """

    def __init__(self, channels: int, *, padding: tuple[int, int], rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: Float[Array, "*axes h w c"]) -> Float[Array, "*axes h2 w2 c"]:
        """Return x at half the height and width."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour up-sampling and a convolution.

    Args:
        channels: Channels of input and output.
        rngs: Source of randomness.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*axes h w c"], size: tuple[int, int]
    ) -> Float[Array, "*axes h2 w2 c"]:
        """Return x at the height and width of `size`."""
        return self.conv(upsample_nearest(x, size))
