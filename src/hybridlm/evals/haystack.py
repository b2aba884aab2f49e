"""Words and filler text of our own, for tasks that hide things in long texts.

RULER takes its words from the package wonderwords and its long haystack from essays under copyright. Neither is here:
words are common English ones listed below, and a haystack is a text that the user gives, or sentences made from these
words. Figures are therefore "own haystack" and do not compare with published ones of other haystacks.
"""

from __future__ import annotations

import numpy as np

__all__ = ["ADJECTIVES", "NOUNS", "VERBS", "made_sentences", "words"]

ADJECTIVES = """
able amber ancient angry apt arid autumn awake bitter blank bold brave brief bright brisk broad broken calm careful
cheap chief clean clear clever cloudy coarse cold common cool copper coral crimson crisp cruel curious damp daring dark
deep dense distant double dry dull dusty eager early eastern easy empty equal faint fair famous fancy fast feeble fierce
final firm flat fond formal fragile free fresh frozen full gentle giant glad golden grand grave great green grey guilty
handy happy hard harsh hasty heavy hidden high hollow honest huge humble hungry idle inner iron jolly keen kind large
late lazy lean light little lively local lonely long loose loud lucky major marble mature merry mild minor modern modest
muddy narrow neat new noble noisy northern odd old open orange outer pale patient plain polite poor proud pure purple
quick quiet rapid rare raw ready red rich ripe rough round royal rude rural rusty sad safe salty scarlet secret shallow
sharp short shy silent silver simple sincere slim slow small smart smooth sober soft solid sour southern spare steady
steep stiff still strange strict strong stubborn sudden sunny super sweet swift tall tame tender thick thin tidy tight
tiny tired tough tropical true ugly upper urban vague valid vast violet vivid warm wary weak wealthy western wet white
wide wild windy winter wise wooden young
""".split()  # noqa: SIM905

NOUNS = """
acorn actor admiral album almond anchor ankle apple apron arrow artist attic author autumn bakery balcony bamboo banana
banner barn barrel basin basket beach beacon beard beaver bell bench berry bicycle biscuit blanket blossom boat bottle
boulder bracelet branch brass bread brick bridge broom brush bucket butcher butter button cabin cactus camel camera
canal candle canoe canvas captain cargo carpet carrot castle cathedral cattle cave cedar cellar chain chair chalk chapel
charcoal cherry chimney circus citizen clay cliff cloak clock cloud clover coach coast cobweb coffee collar comet
compass copper coral corner cotton cousin cradle crane creek cricket crown crystal cupboard curtain daisy dancer desert
diamond dinner doctor dolphin donkey door dragon drawer drum duck eagle elbow elder ember engine envelope evening falcon
farmer feather fence fern ferry fiddle field finger fisher flag flame flute forest fountain fox frost garden garlic gate
ginger giraffe glacier glove goat grain granite grape grass guitar hammer harbor harvest hawk hazel hedge helmet heron
hill honey hook horizon horse hotel island ivory jacket jar jewel journal judge jungle kettle key kitchen kite knight
ladder lake lamp lantern lawyer leaf leather lemon lens letter lighthouse lily linen lion lizard lobster locket lumber
magnet mansion maple marble market marsh meadow melon mill miner mirror monk monkey moon morning moss mountain museum
mushroom napkin needle nest notebook nurse nutmeg oak oasis ocean olive onion orchard otter owl oyster paddle painter
palace panther parcel parrot pasture path peach peacock pearl pebble pencil pepper piano pigeon pillow pilot pine planet
plank plate plaza plow plum pocket poet pond poplar port potato potter prairie prince pumpkin puppet pyramid quarry
quilt rabbit radish raft railway rain raven ribbon ridge ring river road robin rocket roof rope rose ruby saddle sailor
salmon sandal satchel scarf scholar school scissors scroll seed shadow shed sheep shell shepherd shield ship shoulder
shrub silk singer sketch sled smoke snail snow soldier sparrow spice spider spoon spring squirrel stable stadium star
statue stone stork storm stove stream street summer sunset swan sweater table tailor teacher temple tent thimble thistle
thread throne thunder tiger timber tower trail train travel treasure trumpet tulip tunnel turkey turtle umbrella uncle
valley vase velvet village vine violin visitor voyage wagon walnut water weaver well whale wheat wheel whistle willow
window winter wolf wool writer yard zebra
""".split()  # noqa: SIM905

VERBS = """
admires answers carries catches chooses cleans collects counts covers crosses draws drops enters finds follows gathers
greets guards hears helps hides holds joins keeps leaves lifts likes loses makes marks meets mends moves needs notices
opens orders paints passes plants pulls pushes reaches reads remembers repairs saves sees sells sends shares shows takes
teaches thanks throws touches trusts turns visits wants warns washes watches weighs
""".split()  # noqa: SIM905

_PLACES = ("near the", "behind the", "across the", "beyond the", "under the", "beside the", "far from the",
           "above the")
_OPENERS = ("In the morning,", "Later,", "After a while,", "As usual,", "Once more,", "At night,", "By and by,",
            "Without a word,", "Every year,", "For the first time,")


def words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different words in random order: those above, then pairs of them joined by a hyphen."""
    plain = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    found = [plain[i] for i in rng.permutation(len(plain))]
    if count > len(found):
        pairs = len(ADJECTIVES) * len(NOUNS)
        if count - len(found) > pairs:
            raise ValueError(f"{count} different words are more than there are")
        chosen = rng.permutation(pairs)[:count - len(found)]
        found += [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]
    return found[:count]


def made_sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Plain sentences, no two of which tend to be alike."""
    def pick(options: object) -> str:
        return str(options[int(rng.integers(len(options)))])  # type: ignore[index,arg-type]

    found = []
    for _ in range(count):
        core = f"the {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} the {pick(ADJECTIVES)} {pick(NOUNS)}"
        if rng.random() < 0.5:
            core += f" {pick(_PLACES)} {pick(NOUNS)}"
        opener = pick(_OPENERS) if rng.random() < 0.4 else ""
        found.append(f"{opener} {core}." if opener else f"{core[0].upper()}{core[1:]}.")
    return found
