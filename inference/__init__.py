"""A trained model at work: what sample.py is made of."""
