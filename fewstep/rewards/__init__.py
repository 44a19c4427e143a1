"""Rewards: what an image is worth, in itself, for a prompt or for a label.

    reward = make_reward({"hpsv2": {"from": FOLDER}, "image_reward": {"from": FOLDER, "weight": 0.1}})
    value = reward(images, Asked.of(batch))    # [rows] float32, with a graph to the images

`registry.make_reward` reads a recipe's words; `base` holds the contract; every other file is one reward.
"""
