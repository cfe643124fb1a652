"""Checkpoints of other codes: reading theirs, and writing ours for them.

importing          checkpoints of any kind -> `Run`, or a workdir
exporting          a run -> files for improved-diffusion, diffusers, or .safetensors
released           the released checkpoints by name: network, schedule, objective
layouts            tensor names and shapes of other codes <-> our parameters
diffusers_config   JSON files of diffusers <-> our arguments
torch_files        .pt and .safetensors files, without PyTorch
inception_weights  the weights of Inception-v3 for FID
"""
