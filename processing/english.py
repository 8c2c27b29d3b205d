"""English words that tell where a noun phrase begins and ends: closed classes and exceptions.

What it is: lists for `key_expressions.noun_phrases`, made by hand for captions and answers about
photographs. What it is not: a vocabulary of objects; a word in none of the lists counts as a noun.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("""
    a an the this that these those his her its their my our your whose some any each every
    another both all several many few various multiple numerous no other enough more most less
    much certain different own same such what half single only main next last additional one
    two three four five six seven eight nine ten eleven twelve dozen first second third fourth
    fifth zero countless
""")
PREPOSITIONS = _words("""
    of in on at by for with without from into onto upon over under above below beneath beside
    besides behind between among amongst amid around across along against near through
    throughout toward towards inside outside within beyond off out up down about after before
    during until since like unlike as than via per despite including alongside underneath atop
    to regarding
""")
CONJUNCTIONS = _words(
    "and or but nor so yet if while because although though whereas when where why how"
)
PRONOUNS = _words("""
    i you he she it we they me him us them himself herself itself themselves myself yourself
    who whom which someone something anyone anything everyone everything nobody nothing none
    there here mine yours hers theirs ours others ones oneself it's there's that's he's she's
    what's who's they're let's don't doesn't isn't aren't can't i'm you're
""")
AUXILIARIES = _words("""
    is are was were be been being am has have had having do does did doing done can could will
    would shall should may might must cannot get gets got getting
""")
ADVERBS = _words("""
    very also not just still then too quite rather almost away together apart nearby perhaps
    maybe however therefore thus instead overall else even ever never always often sometimes
    usually again already now soon later well far forward forwards backward backwards upward
    upwards downward downwards ahead aside indoors outdoors upright upside inward outward
    sideways overhead somewhere anywhere everywhere back yes okay please hello both either
    neither e.g i.e etc halfway afterwards meanwhile moreover furthermore nonetheless
    nevertheless otherwise alone alike asleep awake aloft full due able closer further farther
    amidst
""")
ADJECTIVES = _words("""
    red green blue yellow brown black white gray grey pink purple orange beige tan golden
    silver maroon turquoise teal navy violet cyan magenta crimson dark light bright pale vivid
    big small large little tiny huge tall short long wide narrow thin thick deep shallow giant
    massive enormous medium miniature high low bigger smaller larger taller shorter longer
    wider older younger lower upper higher inner outer biggest smallest largest tallest oldest
    youngest old young new modern ancient vintage antique rustic adult elderly fresh ripe raw
    round square rectangular circular oval curved straight flat sharp pointed pointy steep
    hollow wooden metallic woolen leather-bound stony sandy grassy rocky snowy muddy dusty
    dirty sunny cloudy rainy foggy misty windy stormy icy wet dry hot cold warm cool open
    closed empty full clean clear smooth rough soft hard heavy strong weak loose tight happy
    sad angry calm quiet busy pretty lovely ugly cute beautiful gorgeous handsome friendly good
    bad nice great fine best better worst real fake rare common simple plain fancy elegant
    furry fluffy hairy bushy leafy lush shaggy spotted striped checkered plaid colorful
    colourful shiny glossy transparent blurry sleek rusty crispy juicy creamy cheesy tasty
    spicy healthy left right front rear central nearby distant far close opposite whole entire
    male female human wild blond blonde bald chubby skinny slim fat lone alone asleep awake
    ready able visible available present similar complete various double triple multi-colored
    quick slow fast lively cozy tidy messy crowded sturdy wavy curly fuzzy hazy dense sparse
    bare tropical urban rural outdoor indoor evergreen asian european african american chinese
    japanese indian french italian british mexican scary funny silly sweet salty sour bitter
    mini extra free safe true false different overcast partial total pure solid stylish lavish
    grand serene vibrant pleasant prominent significant abundant radiant fragrant decadent
    efficient excellent apparent silent decent intact compact exact abstract adjacent attentive
    intent content evident competent relevant important distinct slight bland barren modest
    moist damp ornate delicate intricate unique perfect diverse popular ample sure picturesque
    convenient easy difficult possible certain unripe uneven minimalist concise laid-back
    primary secondary dramatic idyllic sole main nutritious
""")
ADJECTIVES_OR_NOUNS = _words("light orange gold silver cold front plain round square double")
POSITIONS = _words("top bottom left right center centre middle upper lower")
# -al, -ic, -ive, -ous, -ful, -less, -able, -ish words are adjectives but for these
NOUNS_LIKE_ADJECTIVES = _words("""
    animal hospital cereal metal medal petal pedal meal coral canal signal seal festival
    terminal portal mural material journal sandal cymbal crystal capital mammal jackal oatmeal
    veal deal coal goal charcoal individual professional original manual musical arrival
    rehearsal referral trial music traffic picnic fabric plastic mechanic ceramic mosaic attic
    garlic clinic critic comic arctic topic relic tunic graphic graphics olive hive archive
    drive dive five beehive cave locomotive detective executive native relative table vegetable
    cable stable constable timetable bable label collectible fish dish radish starfish goldfish
    swordfish jellyfish shellfish catfish polish finish rubbish crayfish relish parish octopus
    handful spoonful mouthful armful
""")
NOUNS_IN_LY = _words("""
    family butterfly fly belly lily jelly dragonfly holly trolley bully ally assembly firefly
    supply reply potbelly underbelly housefly doily dolly
""")
NOUNS_IN_ING = _words("""
    building buildings ceiling ceilings clothing painting paintings wedding string strings ring
    rings king kings wing wings swing swings railing railings awning awnings evening morning
    spring sling slings earring earrings lightning dumpling duckling sibling siblings pudding
    icing frosting topping toppings stuffing seasoning dressing crossing crossings landing
    drawing drawings marking markings covering coverings lettering writing wiring piping tubing
    lighting flooring fencing paneling siding paving bedding cushioning clearing opening thing
    things filling fillings serving servings setting settings surroundings surrounding
    scaffolding farthing sterling viking outing being beings padding packaging carving carvings
    engraving etching offering offerings helping gathering meeting roofing decking netting
    edging lining plating molding moulding shelving carpeting matting webbing ping-pong surfing
    skiing snowboarding skateboarding bowling boxing wrestling camping parasailing kiteboarding
    windsurfing lemming herring wading bearing reading
""")
# these make a compound with the noun that follows: parking lot, dining table
ING_MODIFIERS = _words("parking dining living vending ironing recycling rocking sewing towering")
NOUNS_IN_ED = _words("""
    bed beds shed sheds seed seeds weed weeds sled sleds bobsled speed breed breeds hundred
    moped mopeds steed reed reeds flatbed feed flowerbed watershed bedspread
""")
# forms that are verbs after a noun ("a man rides") and nouns after a determiner ("the rides")
VERBS = _words("""
    sit sits sat sitting stand stands stood walk walks run runs ran ride rides rode ridden hold
    holds held wear wears wore worn eat eats ate eaten drink drinks drank play plays look looks
    watch watches fly flies flew flown swim swims swam jump jumps leap leaps climb climbs lie
    lies lay lays laid lean leans rest rests sleep sleeps slept hang hangs hung wait waits pull
    pulls push pushes carry carries throw throws threw thrown catch catches caught hit hits
    kick kicks swing swings grab grabs reach reaches ski skis surf surfs skateboard skate
    skates snowboard graze grazes perch perches float floats drive drives drove driven park cut
    cuts chop chops cook cooks prepare prepares serve serves stare stares gaze gazes smile
    smiles laugh laughs talk talks speak speaks say says said read reads write writes wrote
    written show shows shown display displays depict depicts feature features contain contains
    include includes capture captures captured portray portrays showcase showcases suggest
    suggests indicate indicates appear appears seem seems create creates make makes made give
    gives gave given take takes took taken bring brings brought put puts set sets place places
    keep keeps kept leave leaves left go goes went gone come comes came become becomes became
    turn turns turned move moves use uses cover covers fill fills surround surrounds provide
    provides offer offers add adds allow allows enjoy enjoys enhance enhances highlight
    highlights see sees saw seen find finds found know knows known think thinks want wants need
    needs try tries help helps let lets start starts begin begins began stop stops stay stays
    remain remains pose poses point points face faces gather gathers travel travels pass passes
    approach approaches cross crosses follow follows lead leads led contribute contributes
    occupy occupies extend extends stretch stretches line lines dot dots illuminate illuminates
    shine shines shone glow glows rise rises rose fall falls fell fallen blow blows blew blown
    bite bites lick licks sniff sniffs chase chases hug hugs kiss kisses embrace embraces pet
    pets feed feeds fed bathe bathes wash washes clean cleans brush brushes dry dries peek
    peeks hide hides hid hidden emerge emerges overlook overlooks balance balances perform
    performs compete competes swoop dive dives wade wades land lands taxi taxies depart arrives
    arrive board boards focus focuses complete completes emphasize emphasizes evoke evokes
    convey conveys imply implies represent represents consist consists span spans match matches
    share shares support supports attach attaches tie ties tied wrap wraps roll rolls slide
    slides spread spreads scatter scatters stack stacks pile piles mount mounts shed built
    build builds drawn draw draws torn broken cast casts lit bent spun stuck bound sunk strewn
    woven sewn shaken chosen frozen describe describes answer answers explain explains
    participate participates engage engages interact interacts observe observes navigate
    navigates ensure ensures require requires demonstrate demonstrates exhibit exhibits reflect
    reflects resemble resembles dominate dominates meet meets met sell sells sold buy buys open
    opens close closes wave waves separate separates decorate decorates accompany accompanies
    hover hovers soar soars trot trots gallop gallops roam roams wander wanders nap naps curl
    curls crouch crouches kneel kneels squat bitten meant mean join joins vary varies relax
    relaxes belong belongs enter enters explore explores protect protects socialize act acts
    fix fixes work works live lives exit exits feel feels care cares complement complements
    lift lifts drop drops break breaks change changes order orders squats bend bends tilt tilts
    dip dips sip sips pour pours spray sprays splash splashes spill
""")
# nouns of quantity or sort: where "of" follows, the phrase goes on and its head comes later
QUANTITIES = _words("""
    group groups pair pairs couple bunch bunches herd herds flock flocks row rows set sets
    number lot lots variety kind kinds type types sort sorts piece pieces slice slices crowd
    series collection assortment array cluster clusters handful amount line lines team pack
    host majority mix range selection stack stacks pile piles school swarm body bit plenty rest
    patch part parts portion dozens hundreds thousands total
""")
# nouns that no region of an image shows, or all of it does
UNSEEN = _words("""
    image images picture pictures photo photos photograph photographs photography scene scenes
    background foreground view views side sides top bottom left right center centre middle
    corner corners edge edges front back rear part parts end ends position positions direction
    distance location area areas place places spot point way ways total number lot lots variety
    kind kinds type types sort sorts group groups pair series addition presence sense
    atmosphere mood ambiance ambience question questions answer answers example fact facts
    reason reasons moment moments activity activities experience experiences time times day
    days today week year years hour hours minute feeling focus attention interest effect action
    actions event events session fun enjoyment excitement color colors colour colours size
    shape shapes style design appearance condition conditions context environment detail
    details element elements aspect aspects feature features impression overall case result
    results purpose use order level levels amount height length width depth angle angles motion
    movement balance space spaces depiction display arrangement composition combination
    collection contrast backdrop touch theme charm character life nature world rest half
    majority range array mix one ones others thing things something someone object objects item
    items figure stage process progress middle-ground midst vicinity proximity surroundings
    surrounding setting settings lack pose poses need choice skill skills talent ability
    abilities passion love joy power speed caption description conversation idea ideas
    information purposes help work being beings manner expression expressions emotion emotions
    beauty elegance warmth comfort relaxation adventure thrill preparation anticipation
    importance popularity culture history tradition safety security air unison tandem harmony
    contact sizes locations distances heights turn turns challenge trip journey option options
    company situation occasion task tasks practice care sight feel energy spirit flavors ages
    quality routine routines source flow access styles stages role season modes system leisure
    vibe sale break breaks layout hustle bustle novelty perimeter interior close-up mid-air
    enthusiasm opportunity interaction transportation subject subjects diversity intensity
    functionality fairness contents perspective camera-angle orientation yes no not yeah none
    nope unknown answerable unanswerable zero two three four five six seven eight nine ten
""")
ABSTRACT_ENDINGS = (
    *("ness", "ility", "ivity", "osity", "ity", "ship", "ism", "hood", "ance", "ence"),
    *("tion", "sion"),
)
SEEN_DESPITE_ENDING = _words("""
    ship ships battleship spaceship airship steamship entrance fence ambulance appliance prism
    city university facility community cavity hood neighborhood harness witness audience
    residence conference prison station gas-station intersection decoration reflection
    vegetation plantation illustration inscription lotion potion carnation television mansion
    lion
""")
# answers that a model gives instead of an expression
REFUSALS = _words("none n/a nothing null") | {
    "no expressions",
    "no expression",
    "no key expressions",
    "no visual tokens",
    "no visual token",
}
