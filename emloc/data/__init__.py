"""Examples (prompt, images and answer): encode them as tokens and collate them to batches."""
