"""What every stage needs and no stage owns: configs, files, processes, checkpoints, logs."""
