"""What any long job needs: checkpoints, sharding, logs, files."""
