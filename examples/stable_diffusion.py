"""SLR attention in a Stable Diffusion network: guidance branches, text, and links that get better while sampling.

    python examples/stable_diffusion.py

The UNet2DConditionModel has Stable Diffusion's structure (self-attention ``attn1``, text attention ``attn2``), scaled
down, with random weights, so that the script needs no download. With a pipeline, ``zk.patched(pipeline, context)``
takes its ``unet``.
"""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel

import zsvr_kernels as zk
from zsvr_kernels.demo.clip import bundled_clip
from zsvr_kernels.demo.denoise import optical_flow
from zsvr_kernels.demo.drift import along_trajectories

STEPS, GUIDANCE = 6, 5.0
torch.manual_seed(0)
torch.set_grad_enabled(False)

clip = bundled_clip(size=96, frames=6)
flow_forward, flow_backward = optical_flow(clip.frames)  # of the pixels, whatever the latent's size is
T = len(clip.frames)

unet = UNet2DConditionModel(
    sample_size=24,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(32, 64, 64),
    attention_head_dim=4,  # number of heads, by this model's convention
    norm_num_groups=8,
    cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
).eval()
scheduler = DDIMScheduler(num_train_timesteps=1000)
scheduler.set_timesteps(STEPS)

# Stand-ins for what a checkpoint brings: text embeddings, and the latent of every frame.
text = torch.randn(2, 7, 32)  # unconditional, conditional
latents = torch.einsum("oc,tchw->tohw", torch.randn(4, 3), F.avg_pool2d(2 * clip.frames - 1, 4))
start = scheduler.add_noise(latents, torch.randn_like(latents), scheduler.timesteps[:1])


def sample(context: zk.VideoContext | None = None) -> torch.Tensor:
    """Run DDIM with classifier-free guidance; every step of it is a step of the context."""
    x = start
    for k, timestep in enumerate(scheduler.timesteps):
        # The branches are outermost in the batch, [2*T, 4, 24, 24], as diffusers has them.
        both, states = torch.cat((x, x)), text.repeat_interleave(T, 0)
        if context is None:
            eps = unet(both, timestep, encoder_hidden_states=states).sample
        else:
            with context.step(k, STEPS):  # from half of the steps on, features correct the links
                eps = unet(both, timestep, encoder_hidden_states=states).sample
        without, with_text = eps.chunk(2)
        x = scheduler.step(without + GUIDANCE * (with_text - without), timestep, x).prev_sample
    return x


# To see what changes: keep what the first self-attention gives for the conditional branch, [T, P, C].
given = []
layer = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
layer.register_forward_hook(lambda _, inputs, output: given.append(output[T:]))

# Layers get tokens without a grid: `size` is the latent's, from which the grids follow.
context = zk.VideoContext(flow_forward[None], flow_backward[None], size=(24, 24))
spatial = sample()
with zk.patched(unet, context) as report:
    slr = sample(context)
print(report)
print(f"\n{context}")
print(f"the sampled latents changed by {(slr - spatial).norm() / spatial.norm():.1%}")

grid = (24, 24)
moved = [
    (history.forward - context.links(grid).forward).norm(dim=-1).mean()
    for key, history in context.history().items()  # keys are "<layer>/<Hg>x<Wg>"
    if key.endswith("/24x24")
]
print(f"correction moved the links on 24x24 by {torch.stack(moved).mean():.2f} tokens on average")

# How much do features vary along the true paths of the picture at the last step, as a share of their variance?
paths = zk.chain_links(zk.Links.from_flow(clip.flow_forward[None], clip.flow_backward[None], grid=grid))
print(f"drift of what the first layer gives, spatial attention: {along_trajectories(given[STEPS - 1], paths):.3f}")
print(f"drift of what the first layer gives, SLR attention: {along_trajectories(given[-1], paths):.3f}")
