from siglip import *  # noqa: F403
