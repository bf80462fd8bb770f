"""Fine-tuning: settings, the loop, its checkpoints. Nothing is imported until it is used."""
