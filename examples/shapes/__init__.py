"""The embedded model's training data: generated images with questions, answers and dense labels."""
