"""Raw data to token bins: what prepare.py and train_tokenizer.py are made of."""
