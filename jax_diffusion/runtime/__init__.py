"""What any long job needs; nothing here knows of diffusion.

Each file is about one thing, beside which its rules are explained:

    checkpoint    what is saved, how damage is found, the rule of resuming
    sharding      several devices and hosts; how to run on pods
    preemption    SIGTERM and Ctrl-C as a request to save and stop
    logs          metrics.jsonl, run.json, TensorBoard, W&B; what their fields mean
    clock         where the time of training steps goes
    files         atomic writes, .npz files, hashes, JSON; whether a path can be written
    locks         one process at a time writes to a folder or a file
    resumable_npz one .npz written over hours, in parts that survive a kill
    untrusted     JSON and archives of others, checked before they are read
    digests       32 bits of each array, which find a changed one
    orbax         parts for Orbax: less memory, a full disk that is told once
    cpu           flags of XLA on the CPU, compiled programs on disk
    device_peaks  peak FLOP/s of accelerators
"""
