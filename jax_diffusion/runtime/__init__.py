"""What any long job needs; nothing here knows of diffusion.

checkpoint    what is saved, how damage is found, the rule of resuming
sharding      several devices and hosts; how to run on pods
preemption    SIGTERM and Ctrl-C as a request to save and stop
logs          metrics.jsonl, run.json, TensorBoard, W&B; what their fields mean
clock         where the time of training steps goes
files         atomic writes, .npz files, hashes, one .npz written over hours
cpu           flags of XLA on the CPU, compiled programs on disk
device_peaks  peak FLOP/s of accelerators
"""
