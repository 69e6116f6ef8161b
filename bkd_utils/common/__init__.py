"""What knows no model, no backdoor and no notebook: files, assets, kept results, statistics."""
