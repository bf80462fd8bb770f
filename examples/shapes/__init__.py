"""Generated images of simple shapes, with questions, answers and dense labels: what the embedded
model learns from.
"""
