"""What decoding stories with static thresholds is to come to."""

# Threshold -> tokens per forward pass, up to the end of the text.
TOKENS_PER_FORWARD = {0.9: 3.25, 0.8: 4.24, 0.7: 5.12, 0.6: 6.17, 0.5: 7.01}
# Threshold -> least and most percent points of validity lost to the threshold 0.9.
LOST_VALIDITY = {0.8: (0.0, 0.5), 0.7: (1.0, 2.0), 0.6: (2.0, 5.0), 0.5: (4.0, 8.0)}
