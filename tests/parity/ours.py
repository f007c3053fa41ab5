"""Our side of `speed.py`: the steps, compiled as `tav_jax.pipeline` compiles them.

No PyTorch here: its libraries would count in our peak memory.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tav_jax as tav
from tav_jax.models.clip import CLIPTextModel
from tav_jax.models.unet import UNet3DConditionModel
from tav_jax.models.vae import AutoencoderKL
from tav_jax.pretrained import configs as published_config
from tav_jax.pretrained import weights


def make_schedule() -> tav.NoiseSchedule:
    # Of two timesteps, so that one step spans it all and the prediction weighs in the result.
    return tav.make_schedule(
        num_train_timesteps=2,
        beta_start=0.1,
        beta_end=0.9,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        set_alpha_to_one=False,
    )


def peak_device_bytes() -> int:
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def stored_in(
    dtype: str, network: tav.Network, float32_modules: tuple[str, ...] = ()
) -> tav.Network:
    """Returns the network as `tav.load_model` stores it for computation in a type."""
    params = {
        name: value.astype("float32" if weights.in_modules(name, float32_modules) else dtype)
        for name, value in network.params.items()
    }
    return network.with_params(params).with_compute(dtype=dtype)


class Ours:
    """The steps with random weights; what trains is float32, and the rest as the setting says.

    Args:
        setting, inputs: As `speed.py` has them: what both sides compute with.
    """

    def __init__(self, setting: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
        self.setting, self.schedule = setting, make_schedule()
        on_gpu, dtype = setting["device"] == "cuda", setting["dtype"]
        if on_gpu and dtype == "float32":
            # Not TensorFloat-32, so that both sides' numbers can be held to one tolerance.
            jax.config.update("jax_default_matmul_precision", "highest")
        unet_config = published_config.read_unet_config(setting["unet"])
        vae_config = published_config.read_vae_config(setting["vae"])
        text_config = published_config.read_text_config(setting["text_encoder"])
        # On the host, or what is drawn and cast there would count in the device's peak.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            unet_key, vae_key, text_key = jax.random.split(jax.random.key(0), 3)
            unet = tav.init_network(UNet3DConditionModel, unet_config, unet_key)
            vae = tav.init_network(AutoencoderKL, vae_config, vae_key)
            text_encoder = tav.init_network(CLIPTextModel, text_config, text_key)
            unet = stored_in(dtype, unet, tav.TRAINABLE_MODULES)
            vae, text_encoder = stored_in(dtype, vae), stored_in(dtype, text_encoder)
        if on_gpu:
            # By way of NumPy, which commits nothing to the device: a step's results are not
            # committed either, and the second step would compile anew.
            unet, vae, text_encoder = jax.device_put(jax.device_get((unet, vae, text_encoder)))
        self.vae, self.text_encoder = vae, text_encoder
        unet = unet.with_compute(
            attention_implementation=setting["our_attention"],
            gradient_checkpointing=setting["gradient_checkpointing"],
        )
        self.inputs = {name: jnp.asarray(value) for name, value in inputs.items()}

        labels = tav.label_params(unet.params, tav.TRAINABLE_MODULES)
        optimizer = tav.make_optimizer(
            labels,
            setting["learning_rate"],
            adam_weight_decay=setting["weight_decay"],
            max_grad_norm=setting["max_grad_norm"],
        )
        self.state = tav.init_state(unet, optimizer, jax.random.key(0))
        self._train_step = tav.compile_train_step(
            self.vae.config.scaling_factor, optimizer=optimizer, labels=labels
        )
        self._sample = jax.jit(tav.ddim_sample, static_argnames="num_inference_steps")
        self._encode_text = jax.jit(lambda text_encoder, ids: text_encoder(ids))
        self._encode_video = jax.jit(lambda vae, pixel_values: vae.bind().encode(pixel_values))

    def encode(self) -> None:
        """Encodes clip and caption, as a run of `tav_jax.tune` does once before its first step."""
        self.moments, self.context = jax.block_until_ready(
            (
                self._encode_video(self.vae, self.inputs["pixel_values"]),
                self._encode_text(self.text_encoder, self.inputs["input_ids"]),
            )
        )

    def first_draw(self) -> tav.NoisedBatch:
        """Returns what the first tuning step draws."""
        key = jax.random.fold_in(jax.random.fold_in(self.state.key, 0), 0)
        return tav.draw_batch(key, self.moments, self.schedule, self.vae.config.scaling_factor)

    def tuning(self) -> dict[str, jax.Array]:
        self.state, metrics = self._train_step(
            self.state, self.moments, self.context, self.schedule
        )
        return jax.block_until_ready(metrics)

    whole = tuning  # nothing is encoded again

    def guided(self) -> jax.Array:
        """Returns the latents after the schedule's one step, from timestep 1 to the end."""
        return jax.block_until_ready(
            self._sample(
                self.state.unet,
                self.schedule,
                self.inputs["latents"],
                self.inputs["context"],
                self.inputs["negative_context"],
                self.setting["guidance_scale"],
                num_inference_steps=1,
            )
        )

    def tensors(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns every network's parameters as a published checkpoint has them, in float32."""
        networks = {"unet": self.state.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {
            part: dict(
                weights.to_tensor(name, np.asarray(value, np.float32))
                for name, value in network.params.items()
            )
            for part, network in networks.items()
        }

    def first_moments(self) -> dict[str, np.ndarray]:
        """Returns Adam's mean of the gradients: after one step a fixed share of the gradient."""
        moments = optax.tree.get(self.state.opt_state, "mu")
        moments = {k: np.asarray(v) for k, v in moments.items() if isinstance(v, jax.Array)}
        return dict(weights.to_tensor(*item) for item in moments.items())
