"""The Tune-A-Video U-Net in plain PyTorch: the other side of parity tests and of speed comparisons.

It computes what the published UNet3DConditionModel computes, in its layout (b c f h w), in its
order, under its parameter names. Weights are meant to be loaded; the initial values mean nothing.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812, as PyTorch users write it
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TRAINED_MODULES = ("attn1.to_q", "attn2.to_q", "attn_temp")


def math_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(k)) v with the whole score matrix in memory, as published."""
    query, key, value = (
        rearrange(x, "b n (heads k) -> (b heads) n k", heads=heads) for x in (query, key, value)
    )
    unread = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    scale = query.shape[-1] ** -0.5
    scores = torch.baddbmm(unread, query, key.transpose(1, 2), beta=0, alpha=scale)
    out = torch.bmm(scores.softmax(dim=-1), value)
    return rearrange(out, "(b heads) n k -> b n (heads k)", heads=heads)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The same through PyTorch's fused kernels, what a PyTorch user would run today."""
    query, key, value = (
        rearrange(x, "b n (heads k) -> b heads n k", heads=heads) for x in (query, key, value)
    )
    out = F.scaled_dot_product_attention(query, key, value)
    return rearrange(out, "b heads n k -> b n (heads k)")


def first_and_former(tokens: Tensor, frames: int) -> Tensor:
    """For frame i the tokens of frames 0 and i-1 side by side; frame 0 is its own former."""
    tokens = rearrange(tokens, "(b f) n d -> b f n d", f=frames)
    former = torch.arange(-1, frames - 1, device=tokens.device).clamp(min=0)
    first = torch.zeros_like(former)
    both = torch.cat([tokens[:, first], tokens[:, former]], dim=2)
    return rearrange(both, "b f m d -> (b f) m d")


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """[cos, sin] of t * 10000^(-i / half); float32, since bfloat16 cannot hold 981."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Shared(NamedTuple):
    """What all blocks of one network have in common."""

    groups: int
    eps: float
    time_width: int
    context_width: int
    linear_projection: bool
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    checkpointing: bool


class InflatedConv(nn.Conv2d):
    """A 2D convolution of every frame: frames travel in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        out = super().forward(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(out, "(b f) c h w -> b c f h w", f=frames)


class ResnetBlock(nn.Module):
    """Its GroupNorms see the video whole: statistics over frames, height and width together."""

    def __init__(self, inputs: int, width: int, shared: Shared):
        super().__init__()
        self.norm1 = nn.GroupNorm(shared.groups, inputs, eps=shared.eps)
        self.conv1 = InflatedConv(inputs, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(shared.time_width, width)
        self.norm2 = nn.GroupNorm(shared.groups, width, eps=shared.eps)
        self.conv2 = InflatedConv(width, width, 3, padding=1)
        self.conv_shortcut = InflatedConv(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.conv_shortcut(x) + hidden


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, shared: Shared):
        super().__init__()
        self.heads, self.attend = heads, shared.attend
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(self.attend(query, key, value, self.heads))


class SparseCausalAttention(Attention):
    """Queries of frame i meet keys and values of frames 0 and i-1."""

    def forward(self, x: Tensor, frames: int) -> Tensor:
        # Gathered after the projection, as published: each frame is projected once, not twice.
        key, value = (first_and_former(to(x), frames) for to in (self.to_k, self.to_v))
        return self.to_out(self.attend(self.to_q(x), key, value, self.heads))


class GEGLU(nn.Module):
    """Value first, gate second; exact GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, shared: Shared):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = SparseCausalAttention(width, width, heads, shared)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.attn2 = Attention(width, shared.context_width, heads, shared)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        # The Identity holds the place of the published list's dropout of rate 0.
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.Sequential(OrderedDict(net=net))
        self.norm_temp = nn.LayerNorm(width, eps=1e-5)
        self.attn_temp = Attention(width, width, heads, shared)

    def forward(self, x: Tensor, context: Tensor, frames: int) -> Tensor:
        tokens = x.shape[1]
        x = x + self.attn1(self.norm1(x), frames)
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        x = rearrange(x, "(b f) n d -> (b n) f d", f=frames)
        normed = self.norm_temp(x)
        x = x + self.attn_temp(normed, normed)
        return rearrange(x, "(b n) f d -> (b f) n d", n=tokens)


class Transformer(nn.Module):
    """Unlike the resnets', its GroupNorm is per frame with epsilon 1e-6, whatever norm_eps says."""

    def __init__(self, width: int, heads: int, shared: Shared):
        super().__init__()
        self.linear_projection = linear = shared.linear_projection
        self.norm = nn.GroupNorm(shared.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, shared)])
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        frames, height = x.shape[2:4]
        context = repeat(context, "b s d -> (b f) s d", f=frames)
        hidden = self.norm(rearrange(x, "b c f h w -> (b f) c h w"))
        # A projection is a 1x1 convolution of the grid (1.x) or a Linear on tokens (2.x).
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        hidden = rearrange(hidden, "b c h w -> b (h w) c")
        if self.linear_projection:
            hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, context, frames)
        if self.linear_projection:
            hidden = self.proj_out(hidden)
        hidden = rearrange(hidden, "b (h w) c -> b c h w", h=height).contiguous()
        if not self.linear_projection:
            hidden = self.proj_out(hidden)
        return x + rearrange(hidden, "(b f) c h w -> b c f h w", f=frames)


class Block(nn.Module):
    """Resnets of given input widths, the first `attended` of them followed by a transformer."""

    def __init__(self, inputs: list[int], width: int, heads: int, attended: int, shared: Shared):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(n, width, shared) for n in inputs)
        self.attentions = nn.ModuleList(Transformer(width, heads, shared) for _ in range(attended))
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        self.checkpointing = shared.checkpointing

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.run(self.resnets[i], x, temb)
        return self.run(self.attentions[i], x, context) if i < len(self.attentions) else x

    def run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Returns module(*inputs), for the gradient made again unless all is to be kept."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return module(*inputs)
        # Nothing is drawn at random, so there is no state of a generator to restore.
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def resampler(width: int, stride: int) -> nn.Module:
    conv = InflatedConv(width, width, 3, stride=stride, padding=1)
    return nn.Sequential(OrderedDict(conv=conv))


class UNet3D(nn.Module):
    """Predicts noise (or velocity) for latents `b c f h w` at timesteps `b` under text `b s d`.

    Args:
        config: a published `unet/config.json`, of the image network or of a tuned one.
        attention: "math" (as published) or "sdpa" (fused kernels).
        gradient_checkpointing: "none", or "blocks": of residual blocks and transformers only the
            inputs are kept.
    """

    def __init__(self, config: dict, attention: str = "math", gradient_checkpointing: str = "none"):
        super().__init__()
        widths, depth = config["block_out_channels"], config["layers_per_block"]
        top = len(widths) - 1
        # Published configs call the number of heads `attention_head_dim`.
        heads = config["attention_head_dim"]
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        shared = Shared(
            groups=config["norm_num_groups"],
            eps=config["norm_eps"],
            time_width=4 * widths[0],
            context_width=config["cross_attention_dim"],
            linear_projection=config.get("use_linear_projection", False),
            attend={"math": math_attention, "sdpa": sdpa_attention}[attention],
            checkpointing={"none": False, "blocks": True}[gradient_checkpointing],
        )
        self.conv_in = InflatedConv(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.Sequential(
            OrderedDict(
                linear_1=nn.Linear(widths[0], shared.time_width),
                act=nn.SiLU(),
                linear_2=nn.Linear(shared.time_width, shared.time_width),
            )
        )
        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(config["down_block_types"]):
            inputs, width = [width] + [widths[level]] * (depth - 1), widths[level]
            attended = depth if kind.startswith("CrossAttn") else 0
            block = Block(inputs, width, heads[level], attended, shared)
            if level < top:
                block.downsamplers.append(resampler(width, stride=2))
            self.down_blocks.append(block)
            skips += [width] * (depth + len(block.downsamplers))

        self.mid_block = Block([width, width], width, heads[top], 1, shared)

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(range(top, -1, -1), config["up_block_types"], strict=True):
            carried, width = [width] + [widths[level]] * depth, widths[level]
            inputs = [n + skips.pop() for n in carried]
            attended = depth + 1 if kind.startswith("CrossAttn") else 0
            block = Block(inputs, width, heads[level], attended, shared)
            if level > 0:
                block.upsamplers.append(resampler(width, stride=1))
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(shared.groups, width, eps=shared.eps)
        self.conv_out = InflatedConv(width, config["out_channels"], 3, padding=1)

    def forward(self, sample: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        features = timestep_features(timesteps, self.conv_in.out_channels)
        temb = self.time_embedding(features.to(self.conv_in.weight.dtype))
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, temb, context)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = self.mid_block.layer(i, x, temb, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context)
            for upsample in block.upsamplers:
                # Published: twice the size, or the next skip's size where the grid does not halve
                # evenly. On an even grid the two are the same, so the skip always decides.
                x = upsample(F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def freeze_all_but_trained(unet: UNet3D) -> dict[str, nn.Parameter]:
    """Name and parameter of what tuning moves; everything else no longer asks for a gradient."""
    unet.requires_grad_(False)
    for name, module in unet.named_modules():
        if name.endswith(TRAINED_MODULES):
            module.requires_grad_(True)
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, one timestep per video."""
    abar = alphas_cumprod[timesteps][:, None, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def ddim_move(latents: Tensor, noise_pred: Tensor, abar: Tensor, abar_next: Tensor) -> Tensor:
    """Latents at noise level `abar_next`, keeping the noise (Song et al. 2021, eq. 12, eta = 0).

    The same line denoises and inverts: it depends only on which of the two levels is larger.
    """
    x0 = (latents - (1 - abar).sqrt() * noise_pred) / abar.sqrt()
    return abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * noise_pred


@torch.no_grad()
def guided_step(
    unet, latents, t, t_prev, context, negative_context, guidance_scale, alphas_cumprod
) -> Tensor:
    """Latents after one guided DDIM step from t to t_prev (integers; below zero means abar_0)."""
    timesteps = torch.full((2 * len(latents),), t, device=latents.device)
    both = torch.cat([negative_context, context])
    unconditional, conditional = unet(torch.cat([latents, latents]), timesteps, both).chunk(2)
    noise_pred = unconditional + guidance_scale * (conditional - unconditional)
    return ddim_move(latents, noise_pred, alphas_cumprod[t], alphas_cumprod[max(t_prev, 0)])


def tune_step(
    unet, optimizer, latents, noise, timesteps, context, alphas_cumprod, max_grad_norm
) -> tuple[Tensor, Tensor]:
    """Loss and gradient norm (before clipping) of one step; gradients stay readable until the next.

    The optimizer holds what `freeze_all_but_trained` returned, so the norm is over what trains.
    """
    optimizer.zero_grad()
    noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
    loss = F.mse_loss(unet(noisy_latents, timesteps, context).float(), noise.float())
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
    optimizer.step()
    return loss.detach(), grad_norm
