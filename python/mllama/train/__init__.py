"""Fine-tuning: settings, data, the loop, its checkpoints. Nothing is imported until it is used."""
