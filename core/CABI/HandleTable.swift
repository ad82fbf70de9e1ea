import MFACore
import Support

/// The objects that C callers hold. What they hold is a token: a kind, a place in this table and that place's generation, never an address, so
/// that a destroyed, foreign or invented handle is recognised.
final class HandleTable: @unchecked Sendable {
    enum Kind: UInt {
        case context = 1
        case buffer = 2
    }

    private struct Place {
        /// Counts how often the place was given up.
        var generation = HandleTable.firstGeneration
        var kind = Kind.context
        var object: AnyObject?
    }

    // A token's bits: kind 0 ..< 4, place 4 ..< 28, generation from 28 on.
    private static let placeShift: UInt = 4
    private static let generationShift: UInt = 28
    private static let mostPlaces = 1 << 24
    /// Where generations start: no small number is a token, nor is anything that could be an address.
    private static let firstGeneration: UInt = 0x3_6D66_6100

    private var places: [Place] = []
    private var free: [Int] = []

    /// Takes in an object; 0 if the table is full.
    func insert(_ object: AnyObject, _ kind: Kind) -> UInt {
        support_registry_lock()
        defer { support_registry_unlock() }
        let index: Int
        if let last = free.popLast() {
            index = last
        } else {
            if places.count == HandleTable.mostPlaces { return 0 }
            index = places.count
            places.append(Place())
        }
        places[index].kind = kind
        places[index].object = object
        return kind.rawValue | UInt(index) << HandleTable.placeShift | places[index].generation << HandleTable.generationShift
    }

    /// The object of a token, nil if it is none of this kind.
    func find(_ token: UInt, _ kind: Kind) -> AnyObject? {
        support_registry_lock()
        defer { support_registry_unlock() }
        guard let index = index(of: token, kind) else { return nil }
        return places[index].object
    }

    /// Gives up a token, and hands back its object; nil if it is none of this kind.
    func remove(_ token: UInt, _ kind: Kind) -> AnyObject? {
        support_registry_lock()
        defer { support_registry_unlock() }
        guard let index = index(of: token, kind) else { return nil }
        let object = places[index].object
        places[index].object = nil
        places[index].generation = (places[index].generation + 1) & (UInt.max >> HandleTable.generationShift)
        free.append(index)
        return object
    }

    private func index(of token: UInt, _ kind: Kind) -> Int? {
        let index = Int(token >> HandleTable.placeShift) & (HandleTable.mostPlaces - 1)
        guard token & 0xF == kind.rawValue, index < places.count, places[index].kind == kind, places[index].object != nil,
            places[index].generation == token >> HandleTable.generationShift
        else { return nil }
        return index
    }
}

/// All handles of this process.
let handles = HandleTable()
