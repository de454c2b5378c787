"""Fine-tuning on pictures of one's own, for the commands ``zoo train-classifier`` and its like.

Order of reading: ``augment`` (random changes of pictures), ``common`` (what the tasks share), then a module for each
task, which makes batches of files and says what the loss is; the loop is :func:`zoo.training.fit`.
"""
