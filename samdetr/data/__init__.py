"""COCO-format data sets: reading, checking, decoding, augmentation, batching and loading.

Import from the modules: nothing is imported here, so that reading a recipe stays quick.
"""
