"""Networks, in Flax Linen. They never see a schedule: (x, timesteps) in, output out."""
