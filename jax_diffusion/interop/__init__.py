"""Checkpoints of other codes: reading theirs, and writing ours for them.

    coming_from_diffusers  old calls of diffusers' Flax classes beside ours
    importing          checkpoints of any kind -> `Run`, or a workdir
    state_dicts        the network in a file, however its trainer has wrapped it
    hub_folders        folders of diffusers
    foreign            checks a config that comes with a file of somebody else
    recognize          which released checkpoint an unknown file may be
    exporting          a run -> files for improved-diffusion, diffusers, or .safetensors
    released           the released checkpoints by name: network, schedule, objective
    layouts            tensor names and shapes of other codes <-> our parameters
    lucidrains_layout  the same for lucidrains' U-Net, only to read
    dit_layout         the same for the Diffusion Transformer
    diffusers_config   JSON files of diffusers <-> our arguments
    torch_files        .pt files, without PyTorch
    pickles            the pickles inside, of which nothing is run
    safetensors_files  .safetensors files
    tensors            tensors that lie in a file and are read when they are used
    file_kinds         what a file is that is no checkpoint
    inception_weights  the weights of Inception-v3 for FID

No code in a file is run, and PyTorch need not be installed.
"""
