"""The words of the task ``one-sentence``: nouns for things, some of them to train on and the others to evaluate on.

A line is a kind of thing, and every fourth word of a line is for evaluation: both parts are of the same kinds.
"""

_NOUNS = """
apple pear plum cherry grape lemon melon orange peach banana strawberry fig apricot coconut mango raspberry
bread cake cheese soup butter honey pasta pizza salad sandwich sugar pepper sausage pancake cookie pie
potato carrot onion tomato cabbage pumpkin bean pea garlic mushroom cucumber spinach lettuce radish olive corn
coffee tea milk juice wine beer lemonade cocoa bottle cup mug jug kettle teapot barrel straw
dog cat cow pig sheep goat donkey horse pony rabbit hamster chicken duck goose turkey kitten
lion tiger bear wolf fox deer elephant giraffe monkey zebra camel kangaroo squirrel hedgehog badger otter
bird eagle owl crow swan parrot pigeon sparrow penguin robin stork peacock seagull woodpecker feather nest
fish shark whale dolphin salmon trout crab lobster octopus seal turtle frog snail shell herring oyster
bee ant butterfly spider beetle ladybird wasp moth dragonfly grasshopper worm flea mosquito cricket cobweb beehive
tree oak pine birch willow maple leaf branch root acorn log bark bush hedge twig stump
flower rose tulip daisy lily sunflower violet grass moss fern ivy thistle petal seed bouquet weed
hill mountain valley cliff cave rock stone volcano desert canyon meadow field forest path pebble sand
river lake ocean sea pond stream waterfall island beach wave harbour bay swamp well fountain iceberg
rain snow wind storm cloud fog frost thunder lightning rainbow ice hail breeze puddle sunrise shadow
sun moon star planet comet rocket telescope satellite sky earth astronaut globe compass magnet crater horizon
house cottage castle palace tower barn tent cabin hut lighthouse mill church temple hotel shed garage
door window wall roof floor chimney stair balcony cellar attic kitchen bedroom bathroom fence gate porch
table chair desk bed sofa shelf cupboard wardrobe bench stool drawer carpet curtain pillow blanket mirror
lamp candle torch lantern clock bell radio television camera telephone computer keyboard printer battery fridge oven
plate bowl spoon fork knife pan pot tray napkin basket jar lid sieve ladle tablecloth toaster
hammer saw nail screw drill ladder rope chain axe shovel rake bucket brush wheelbarrow spanner wire
coat hat shoe boot sock glove scarf shirt skirt trousers jacket belt sweater dress slipper pocket
ring necklace crown button zip needle thread wool ribbon handbag purse wallet umbrella watch bracelet comb
hand foot finger thumb knee elbow nose ear eye mouth tooth tongue beard shoulder heart bone
baby brother sister mother father uncle aunt cousin grandmother grandfather child neighbour friend guest twin bride
doctor nurse teacher farmer baker butcher painter tailor carpenter sailor soldier pilot waiter fisherman gardener judge
king queen prince princess knight pirate wizard witch giant dragon ghost fairy robot clown thief detective
school library museum hospital market shop bakery bank factory theatre cinema restaurant prison station airport zoo
city village street road bridge tunnel park square pavement crossing roundabout lamppost statue plaza cemetery suburb
car bus train lorry bicycle motorbike tram taxi tractor ambulance van wagon sledge wheel engine caravan
ship boat canoe ferry yacht raft submarine anchor sail oar mast deck lifeboat port aeroplane helicopter
book letter newspaper pencil pen paper map stamp envelope diary dictionary eraser ruler poster ticket postcard
piano guitar violin drum flute trumpet harp organ cello whistle song choir orchestra dance stage microphone
ball doll kite puzzle swing slide balloon puppet marble skateboard racket goal trophy medal football chessboard
spring summer autumn winter morning evening night birthday wedding holiday picnic party festival parade circus concert
gold silver iron copper diamond pearl coin treasure box key lock bag suitcase parcel present flag
""".split()

EVALUATION = tuple(_NOUNS[3::4])

TRAINING = tuple(word for i, word in enumerate(_NOUNS) if i % 4 != 3)
