"""Coming from diffusers' Flax classes: their calls, and what to write here.

diffusers 0.42 has no Flax classes any more. What they did is taken apart here: a
scheduler is a table of the process (`schedule`), a function that makes one step
(`samplers.ddim_step`), and the network read as a prediction of x_0 (`denoise_fn`).
Images are [b, h, w, c], with channels last; `t` is int32 [b] and counts rows of the
schedule; nothing is jitted before you do it.

With a network `model_fn(x_t, timesteps)`, this samples as FlaxDDIMScheduler did after
`set_timesteps(state, 50)`:

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from jax_diffusion import diffusion, guidance, losses, models, samplers
    >>> from jax_diffusion import schedules, spacing
    >>> from jax_diffusion.diffusion import Objective
    >>> def model_fn(x_t, timesteps):  # any network
    ...     return 0.1 * x_t
    >>> betas = schedules.linear_betas(1000, rescale=False)
    >>> keep = spacing.uniform_steps(1000, 50)
    >>> schedule = schedules.make_schedule(betas, keep=keep)
    >>> denoise_fn = diffusion.denoiser(model_fn, schedule, Objective())
    >>> keys = samplers.image_keys(jax.random.key(0), jnp.arange(4))
    >>> x_T = samplers.pure_noise(keys, schedule, (8, 8, 3))
    >>> samplers.sample(keys, denoise_fn, samplers.ddim_step, schedule, x_T).shape
    (4, 8, 8, 3)

The tables need some more names, all of which any training has:

    >>> key, num_steps, objective = jax.random.key(1), 50, Objective()
    >>> x_0, eps = jnp.zeros((4, 8, 8, 3)), samplers.normal(keys, (8, 8, 3))
    >>> t = jnp.array([0, 10, 20, 49])
    >>> x_t = diffusion.q_sample(schedule, x_0, t, eps)
    >>> state = samplers.start(x_T)
    >>> given = keys, denoise_fn, schedule, state, jnp.full(4, 49)
    >>> chain = keys, denoise_fn, samplers.ddim_step, schedule, x_T

## The process

| diffusers | here |
| --- | --- |
| `beta_schedule="linear"` | `schedules.linear_betas(1000, rescale=False)` |
| `beta_schedule="scaled_linear"` | `schedules.quadratic_betas(1000)` |
| `beta_schedule="squaredcos_cap_v2"` | `schedules.cosine_betas(1000)` |
| `trained_betas=betas` | `schedules.given_betas(1000, betas=betas)` |
| `rescale_betas_zero_snr=True` | `schedules.zero_terminal_snr(betas)` |
| `state = scheduler.create_state()` | `schedules.make_schedule(betas)` |
| `state.common.alphas_cumprod` | `schedule.now.signal**2` |
| `state.init_noise_sigma` | `schedule.next.noise[-1]` |
| `dtype=jnp.float32` | always: tables are made in float64, and cast to float32 |

`start=` and `end=` are `beta_start` and `beta_end`. They are as in diffusers by
default, but scaled by 1000 / T unless `rescale=False`.

## Which steps

| diffusers | here |
| --- | --- |
| `scheduler.set_timesteps(state, 50)` | `schedules.make_schedule(betas, keep=keep)` |
| `state.timesteps` | `schedule.timesteps[::-1]` |
| `timestep_spacing="leading"` | `spacing.uniform_steps(1000, num_steps)` |
| `timestep_spacing="trailing"` | `spacing.trailing_steps(1000, num_steps)` |
| `timestep_spacing="linspace"` | `np.linspace(0, 999, num_steps).round()` |
| steps of `FlaxDPMSolver...` | `np.linspace(0, 999, num_steps + 1).round()[1:]` |
| `steps_offset=1` | `spacing.uniform_steps(1000, num_steps) + 1` |
| `set_alpha_to_one=True` | always: the last step leads to clean data |
| `set_alpha_to_one=False` | no switch; leave out row 0, as below |

`keep` may be any increasing steps, and each step leads to the next one of them.
`uniform_steps` and `trailing_steps` choose those of diffusers if their number divides
1000; else diffusers floors or rounds a stride. Stable Diffusion's settings,
`steps_offset=1, set_alpha_to_one=False`, end at the level of step 0, without a call of
the network there:

    >>> offset = np.append(0, keep + 1)  # 0, 1, 21, 41, ...
    >>> shifted = schedules.make_schedule(betas, keep=offset)
    >>> ts = jnp.arange(50, 0, -1)  # not row 0
    >>> shifted_fn = diffusion.denoiser(model_fn, shifted, Objective())
    >>> samplers.sample(keys, shifted_fn, samplers.ddim_step, shifted, x_T, ts=ts).shape
    (4, 8, 8, 3)

## What the network predicts

| diffusers | here |
| --- | --- |
| `prediction_type="epsilon"` | `Objective(mean_type="eps")` |
| `prediction_type="sample"` | `Objective(mean_type="x_0")` |
| `prediction_type="v_prediction"` | `Objective(mean_type="v")` |
| `variance_type="fixed_small"` | `Objective(var_type="fixed_small")` |
| `variance_type="fixed_large"` | `Objective(var_type="fixed_large")` |
| `variance_type="learned_range"` | `Objective("eps", "learned_range", "hybrid")` |
| `variance_type="learned"` | none: that output is the variance, ours its logarithm |
| `variance_type="fixed_small_log"` | none: in PyTorch it is "fixed_small" |
| `clip_sample=True` | `diffusion.clip_x_0(denoise_fn)` |
| `clip_sample_range=2.0` | `diffusion.clip_x_0(denoise_fn, -2.0, 2.0)` |
| `thresholding=True` | `diffusion.threshold_x_0(denoise_fn)` |
| `dynamic_thresholding_ratio=0.9` | `diffusion.threshold_x_0(denoise_fn, 0.9)` |
| `sample_max_value=1.0` | always 1 |
| `scheduler.scale_model_input(...)` | none needed: x_t is what a network trains on |

diffusers clips by default; here nothing clips unless it is wrapped. After clipping,
`ddim_step` computes eps anew from x_0, which is `use_clipped_model_output=True` there.

## Training and sampling

| diffusers | here |
| --- | --- |
| `scheduler.add_noise(...)` | `diffusion.q_sample(schedule, x_0, t, eps)` |
| `scheduler.get_velocity(...)` | `diffusion.v_from_x_0(schedule, x_t, t, x_0)` |
| a loss | `losses.training_loss(key, model_fn, schedule, objective, x_0, t)` |
| `FlaxDDPMScheduler.step(...)` | `samplers.ddpm_step(*given)` |
| `FlaxDDIMScheduler.step(..., eta=0.5)` | `samplers.ddim_step(*given, eta=0.5)` |
| `FlaxDPMSolverMultistepScheduler.step(...)` | `samplers.dpmpp_2m_step(*given)` |
| `FlaxEulerDiscreteScheduler.step(...)` | `samplers.ddim_step(*given)` |
| `FlaxKarrasVeScheduler.step(...)` | `samplers.edm_heun_step(*given)` |
| `FlaxPNDMScheduler`, `FlaxLMSDiscreteScheduler` | none |
| `FlaxScoreSdeVeScheduler` | none |
| a loop over `state.timesteps` | `samplers.sample(*chain)` |
| `output.prev_sample` | `samplers.ddim_step(*given).x` |
| noise times `init_noise_sigma` | `samplers.pure_noise(keys, schedule, (8, 8, 3))` |

A step calls the network itself, through `denoise_fn`, so that guidance and clipping
are wrappers of that. There is one key for each image instead of one for a batch.

The same names did other things in some places. FlaxDDPMScheduler took every step as
one from t to t - 1, however few were taken; here a shorter chain has its own
posterior. FlaxDDIMScheduler never added the noise that eta asks for.
FlaxDPMSolverMultistepScheduler ended at the level of step 0; its order 3, the solver
"dpmsolver" and `solver_type="heun"` are not here, but `samplers.unipc_step` is of order
3. FlaxKarrasVeScheduler raised levels by churn, for which there is `schedules.churned`.

## Networks, pipelines, files

With a run that was loaded or trained, such as `run = jd.load_run("runs/digits")`, and

    >>> import jax_diffusion as jd
    >>> from jax_diffusion.interop.diffusers_config import process_from_scheduler
    >>> from jax_diffusion.interop.exporting import export_run
    >>> def label_model_fn(x_t, timesteps, label):  # 10 means that no label is given
    ...     return 0.1 * x_t
    >>> label_fn = diffusion.denoiser(label_model_fn, schedule, objective)
    >>> label, times = jnp.array([3, 1, 4, 1]), schedule.timesteps[t]

| diffusers | here |
| --- | --- |
| `FlaxUNet2DConditionModel(...)` | `models.UNet(channels=32, out_channels=3)` |
| `unet.init_weights(key)` | `models.init_params(run.model, key, run.image_shape)` |
| `unet.apply(...)` | `models.bind(run.model, run.params)(x_t, times)` |
| `FlaxDiffusionPipeline.from_pretrained(...)` | `jd.load_checkpoint("theirs")` |
| `pipeline(...)` | `jd.sample_images(run, n=2, sampler="ddim", steps=4)` |
| `guidance_scale=3.0` | `guidance.classifier_free(label_fn, label, 10, 3.0)` |
| `pipeline.save_pretrained(...)` | `export_run(run, "diffusers", "ours")` |
| `scheduler.from_pretrained(...)` | `process_from_scheduler({"beta_start": 1e-4})` |
| `push_to_hub`, `from_flax` | none |
| `pmap`, `replicate`, `shard` | none needed: arrays that lie on a mesh |

What is read and written is the pipeline of an unconditional or labeled UNet2DModel, as
those of `google/ddpm-*`, by its PyTorch files: `from_pt=True` is always so, and weights
in `.msgpack` are not read. There is no Stable Diffusion: FlaxStableDiffusionPipeline,
FlaxStableDiffusionXLPipeline, FlaxAutoencoderKL and FlaxControlNetModel, and
FlaxUNet2DConditionModel with the weights of Stable Diffusion, have no equivalent. A
network here attends to sequences of any encoder (`token_dim` of `models.UNet`), but
must be trained from its beginning.
"""
