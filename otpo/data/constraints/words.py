"""Words of the constraint task: things by group in several languages, subjects, verbs and what fills a sentence."""

LANGUAGES = ("en", "es", "fr", "de", "it", "pt")
"""Codes of the languages that items of a list are asked in."""
LANGUAGE_NAMES = {
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "de": "German",
    "it": "Italian",
    "pt": "Portuguese",
}

_RAW = {
    "animals": {
        "en": "dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey duck chicken "
        "bird fish snake frog giraffe zebra deer",
        "es": "perro gato caballo vaca cerdo oveja cabra león tigre oso lobo zorro conejo ratón elefante mono pato",
        "fr": "chien chat cheval vache cochon mouton chèvre lion tigre ours loup renard lapin souris éléphant singe",
        "de": "Hund Katze Pferd Kuh Schwein Schaf Ziege Löwe Tiger Bär Wolf Fuchs Hase Maus Elefant Affe Ente",
        "it": "cane gatto cavallo mucca maiale pecora capra leone tigre orso lupo volpe coniglio topo elefante",
        "pt": "cachorro gato cavalo vaca porco ovelha cabra leão tigre urso lobo raposa coelho rato elefante macaco",
    },
    "colors": {
        "en": "red blue green yellow black white brown orange pink purple gray gold silver violet turquoise beige",
        "es": "rojo azul verde amarillo negro blanco marrón naranja rosa morado gris violeta dorado",
        "fr": "rouge bleu vert jaune noir blanc marron orange rose violet gris doré brun",
        "de": "rot blau grün gelb schwarz weiß braun orange rosa lila grau violett golden",
        "it": "rosso blu verde giallo nero bianco marrone arancione rosa viola grigio dorato",
        "pt": "vermelho azul verde amarelo preto branco marrom laranja rosa roxo cinza dourado",
    },
    "fruits": {
        "en": "apple banana orange grape pear peach plum cherry lemon lime mango pineapple strawberry raspberry kiwi "
        "melon watermelon apricot fig papaya blueberry coconut",
        "es": "manzana plátano naranja uva pera melocotón ciruela cereza limón mango piña fresa melón sandía higo",
        "fr": "pomme banane orange raisin poire pêche prune cerise citron mangue ananas fraise melon pastèque figue",
        "de": "Apfel Banane Orange Traube Birne Pfirsich Pflaume Kirsche Zitrone Mango Ananas Erdbeere Melone Feige",
        "it": "mela banana arancia uva pera pesca prugna ciliegia limone mango ananas fragola melone anguria fico",
        "pt": "maçã banana laranja uva pera pêssego ameixa cereja limão manga abacaxi morango melão melancia figo",
    },
    "body parts": {
        "en": "head hand foot arm leg eye ear nose mouth hair finger knee heart neck shoulder back tooth",
        "es": "cabeza mano pie brazo pierna ojo oreja nariz boca pelo dedo rodilla corazón cuello hombro",
        "fr": "tête main pied bras jambe œil oreille nez bouche cheveux doigt genou cœur cou épaule",
        "de": "Kopf Hand Fuß Arm Bein Auge Ohr Nase Mund Haar Finger Knie Herz Hals Schulter",
        "it": "testa mano piede braccio gamba occhio orecchio naso bocca capelli dito ginocchio cuore collo spalla",
        "pt": "cabeça mão pé braço perna olho orelha nariz boca cabelo dedo joelho coração pescoço ombro",
    },
    "foods": {
        "en": "bread cheese milk egg rice meat chicken fish soup salad butter sugar salt potato tomato onion cake",
        "es": "pan queso leche huevo arroz carne pollo pescado sopa ensalada mantequilla azúcar sal patata tomate",
        "fr": "pain fromage lait œuf riz viande poulet poisson soupe salade beurre sucre sel tomate oignon",
        "de": "Brot Käse Milch Ei Reis Fleisch Huhn Fisch Suppe Salat Butter Zucker Salz Kartoffel Tomate",
        "it": "pane formaggio latte uovo riso carne pollo pesce zuppa insalata burro zucchero sale patata pomodoro",
        "pt": "pão queijo leite ovo arroz carne frango peixe sopa salada manteiga açúcar sal batata tomate",
    },
    "things in a house": {
        "en": "table chair door window bed lamp kitchen wall roof floor sofa mirror clock book key cup spoon",
        "es": "mesa silla puerta ventana cama lámpara cocina pared techo suelo sofá espejo reloj libro llave",
        "fr": "table chaise porte fenêtre lit lampe cuisine mur toit sol canapé miroir horloge livre clé",
        "de": "Tisch Stuhl Tür Fenster Bett Lampe Küche Wand Dach Boden Sofa Spiegel Uhr Buch Schlüssel",
        "it": "tavolo sedia porta finestra letto lampada cucina muro tetto pavimento divano specchio orologio libro",
        "pt": "mesa cadeira porta janela cama lâmpada cozinha parede telhado chão sofá espelho relógio livro chave",
    },
}
ITEMS = {group: {code: tuple(words.split()) for code, words in of.items()} for group, of in _RAW.items()}
"""Things by group and language."""
GROUPS = tuple(ITEMS)

SUBJECTS = (
    "teacher",
    "farmer",
    "doctor",
    "child",
    "king",
    "sailor",
    "baker",
    "painter",
    "student",
    "driver",
    "singer",
    "neighbor",
    "soldier",
    "writer",
    "gardener",
)
"""Whom a sentence is about."""
KEYWORDS = (
    "river",
    "garden",
    "mountain",
    "bridge",
    "letter",
    "window",
    "market",
    "winter",
    "morning",
    "music",
    "forest",
    "island",
    "castle",
    "lantern",
    "train",
    "kitchen",
    "summer",
    "village",
    "ocean",
    "paper",
    "basket",
    "ladder",
    "mirror",
    "journey",
    "silver",
    "harvest",
    "thunder",
    "pencil",
    "candle",
    "orchard",
)
"""Words that a sentence is asked to contain."""
ADVERBS = ("slowly", "quietly", "happily", "carefully", "often", "gladly", "calmly", "early", "today", "again")
ADJECTIVES = ("old", "young", "kind", "tired", "brave", "clever", "quiet", "happy", "tall", "friendly")
VERBS = ("saw", "found", "liked", "remembered", "painted", "loved", "described", "visited", "watched", "noticed")
